// One MoE layer: every token visits its top-2 experts, wherever they live, and comes home summed.
// Run it alone, or as ranks: expertwire launch -n 4 -- ./moe_layer
#include <cstdio>
#include <vector>

#include "expertwire/expertwire.hpp"

int main() try {
  using namespace expertwire;
  auto communicator = Communicator::from_environment();  // also torchrun, mpirun, srun
  const MoeShape shape{/*hidden=*/512, /*experts=*/16, /*top_k=*/2, /*max_tokens=*/64, DType::fp32};
  auto layer = HighThroughput::create(communicator, {shape});

  const int tokens = 60 + communicator->rank() % 4;  // ranks may have different numbers of tokens
  std::vector<float> x(static_cast<std::size_t>(tokens) * 512, 1.0F), weights(tokens * 2, 0.5F);
  std::vector<std::int32_t> experts(static_cast<std::size_t>(tokens) * 2);
  for (int i = 0; i < tokens * 2; ++i) experts[i] = (i * 7 + communicator->rank()) % 16;

  auto sent = layer->dispatch({.x = {x.data(), DType::fp32, {tokens, 512}},
                               .topk_idx = {experts.data(), DType::int32, {tokens, 2}},
                               .topk_weights = {weights.data(), DType::fp32, {tokens, 2}}});

  // The experts of this rank. Here an expert returns its input; a row is summed over its experts.
  float* row = sent.outputs.x.as<float>();
  for (int i = 0; i < sent.outputs.x.size(0); ++i, row += 512) {
    const float* w = sent.outputs.topk_weights.as<float>() + i * 2;
    for (int h = 0; h < 512; ++h) row[h] *= w[0] + w[1];
  }

  auto home = layer->combine({.y = sent.outputs.x, .handle = sent.handle});
  const float* out = home.out.as<float>();
  for (int i = 0; i < tokens * 512; ++i)
    if (out[i] != 1.0F) return std::puts("wrong"), 1;
  std::printf("rank %d of %d: %d tokens went out, %lld rows came in, all came home\n",
              communicator->rank(), communicator->size(), tokens,
              static_cast<long long>(sent.outputs.x.size(0)));
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
