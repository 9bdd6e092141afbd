// Any number of ranks from 1 to 8, in both modes, all options in turn.

#include <gtest/gtest.h>

#include "ranks/requests.hpp"

namespace expertwire::test {
namespace {

using reference::RoundTripOptions;
using reference::RoutingPattern;
using reference::Workload;

class ManyRanks : public testing::TestWithParam<int> {};

TEST_P(ManyRanks, BothModesMatchTheOracle) {
  const int ranks = GetParam();
  const MoeShape shape{128, 6 * ranks, 5, 37, DType::bf16};
  const Workload workload({shape, ranks, 77, RoutingPattern::parse("masked:0.2"), true, 0.1});
  Reports reports;
  with_thread_ranks(ranks, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ll = LowLatency::create(communicator, {shape});
    auto ht = HighThroughput::create(communicator, with_pool(shape));
    for (int step = 0; step < 10; ++step) {
      RoundTripOptions how;
      how.bias = step % 3 == 1;
      how.split = step % 4 == 3;
      how.payload =
          step % 5 == 2 ? RoundTripOptions::Payload::cast : RoundTripOptions::Payload::plain;
      if (step % 2 == 1) how.weights = RoundTripOptions::Weights::combine;
      reports.add(round_trip(*ll, *communicator, workload, step, how));
      how.weights = RoundTripOptions::Weights::dispatch;
      how.payload =
          step % 5 == 2 ? RoundTripOptions::Payload::fp8 : RoundTripOptions::Payload::plain;
      how.output = step % 2 == 0 ? HighThroughput::Output::owned : HighThroughput::Output::pool;
      how.in_place = step % 4 == 1;
      how.capacity = step % 3 == 2 ? 0.6 : 0;
      how.weights_home = step % 2 == 0;
      how.cached = step % 5 == 4;
      reports.add(round_trip(*ht, *communicator, workload, step, how));
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Ranks, ManyRanks, testing::Range(1, 9),
                         [](const auto& test) { return "r" + std::to_string(test.param); });

}  // namespace
}  // namespace expertwire::test
