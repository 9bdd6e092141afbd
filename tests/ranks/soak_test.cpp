// Two thousand low-latency round trips with changing routing; the thread sanitizer's main course.

#include <gtest/gtest.h>

#include "ranks/thread_ranks.hpp"

namespace expertwire::test {
namespace {

TEST(Soak, TwoThousandLowLatencyRoundTrips) {
  const MoeShape shape{32, 12, 3, 12, DType::bf16};
  const reference::Workload workload(
      {shape, 3, 77, reference::RoutingPattern::parse("masked:0.2"), true});
  Reports reports;
  with_thread_ranks(3, [&](const std::shared_ptr<Communicator>& communicator) {
    auto object = LowLatency::create(communicator, {shape, 2, 2});
    for (int step = 0; step < 2000; ++step) {
      reference::RoundTripOptions options;
      options.weights = step % 2 == 0 ? reference::RoundTripOptions::Weights::dispatch
                                      : reference::RoundTripOptions::Weights::combine;
      options.split = step % 3 == 0;
      reports.add(round_trip(*object, *communicator, workload, step, options));
    }
  });
}

}  // namespace
}  // namespace expertwire::test
