// Every shape of the models that people run, in both modes.

#include <gtest/gtest.h>

#include <ostream>

#include "ranks/thread_ranks.hpp"

namespace expertwire::test {
namespace {

struct ModelCase {
  int hidden, experts, top_k;
};

// Distinct (hidden, experts, top-k); `expertwire models` names them.
constexpr ModelCase kModels[] = {
    {7168, 256, 8},  {4096, 256, 6},  {7168, 384, 6},  {5120, 160, 6},  {2048, 64, 6},
    {7168, 384, 8},  {3584, 896, 16}, {2304, 256, 8},  {2048, 128, 8},  {4096, 128, 8},
    {6144, 160, 8},  {2048, 512, 10}, {2048, 256, 8},  {3072, 256, 8},  {4096, 512, 10},
    {2560, 512, 10}, {2048, 60, 4},   {3584, 64, 8},   {5120, 160, 8},  {6144, 256, 8},
    {4096, 8, 2},    {6144, 8, 2},    {2880, 128, 4},  {2880, 32, 4},   {5120, 16, 1},
    {5120, 128, 1},  {6144, 128, 4},  {6144, 32, 2},   {4096, 256, 8},  {4096, 288, 8},
    {7168, 48, 3},   {2688, 128, 6},  {1024, 512, 22}, {2048, 512, 22}, {2816, 128, 8},
    {2048, 64, 8},   {4096, 128, 6},  {4096, 64, 8},   {6144, 16, 4},   {7168, 128, 2},
    {8192, 64, 8},   {2560, 64, 6},   {6144, 512, 12}, {4096, 72, 10},  {1536, 40, 8},
    {8192, 256, 8},  {7168, 128, 4},  {16384, 128, 8},
};

void PrintTo(const ModelCase& c, std::ostream* out) {
  *out << "H " << c.hidden << " E " << c.experts << " K " << c.top_k;
}

class ModelShapes : public testing::TestWithParam<ModelCase> {};

TEST_P(ModelShapes, RoundTrip) {
  const ModelCase& c = GetParam();
  const int ranks = c.experts % 4 == 0 ? 4 : 2;
  const MoeShape shape{c.hidden, c.experts, c.top_k, 6, DType::bf16};
  const reference::Workload workload(
      {shape, ranks, 7, reference::RoutingPattern::parse("powerlaw:1.01"), true});
  Reports reports;
  with_thread_ranks(ranks, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ll = LowLatency::create(communicator, {shape});
    auto ht = HighThroughput::create(communicator, {shape});
    for (int step = 0; step < 3; ++step) {
      reports.add(round_trip(*ll, *communicator, workload, step, {}));
      reports.add(round_trip(*ht, *communicator, workload, step, {}));
    }
  });
}

INSTANTIATE_TEST_SUITE_P(All, ModelShapes, testing::ValuesIn(kModels), [](const auto& test) {
  return "H" + std::to_string(test.param.hidden) + "_E" + std::to_string(test.param.experts) +
         "_K" + std::to_string(test.param.top_k);
});

}  // namespace
}  // namespace expertwire::test
