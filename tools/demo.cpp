#include "demo.hpp"

#include <fmt/format.h>

#include "backend.hpp"
#include "base/env.hpp"
#include "bench.hpp"
#include "launcher.hpp"
#include "models.hpp"

namespace expertwire::tools {

namespace {

BenchOptions options_for(bool high_throughput, int tokens) {
  const ModelShape& model = find_model("deepseek-v3");
  BenchOptions bench;
  bench.high_throughput = high_throughput;
  bench.model = model.name;
  bench.shape = {model.hidden, model.experts, model.top_k, tokens, DType::bf16};
  bench.routing = "powerlaw:1.01";  // busiest rank about 2.5 x the mean at 32 ranks, as on R1
  bench.iterations = 10;
  bench.warmup = 2;
  return bench;
}

}  // namespace

int run_demo(const DemoOptions& options, const std::vector<std::string>& command) {
  if (!Env::get().rank) {
    fmt::print(
        "A DeepSeek-V3-shaped MoE layer over {} rank processes of this machine: dispatch, "
        "experts, combine;\nevery value is compared with a single-process reference.\n\n",
        options.ranks);
    std::fflush(stdout);
    const double start = now_us();
    const int status = launch({options.ranks, command});
    fmt::print("\n{} in {:.1f} s\n", status == 0 ? "All right" : "FAILED",
               (now_us() - start) / 1e6);
    return status;
  }
  const BenchOptions large = options_for(true, options.tokens);
  const BenchOptions small = options_for(false, options.small_tokens);
  const int size = *Env::get().size;
  const bool cuda = wants_cuda("auto", local_size());
  const std::size_t arena = cuda ? arena_bytes_for(large, size) + arena_bytes_for(small, size) : 0;
  auto communicator =
      Communicator::from_environment(communicator_options(cuda, local_rank(), arena));
  std::int64_t wrong = 0;
  wrong += report(*communicator, large, measure(communicator, large));
  if (communicator->rank() == 0) fmt::print("\n");
  wrong += report(*communicator, small, measure(communicator, small));
  std::fflush(stdout);
  return wrong == 0 ? 0 : 1;
}

}  // namespace expertwire::tools
