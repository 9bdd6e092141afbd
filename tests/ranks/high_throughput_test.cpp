#include "expertwire/high_throughput.hpp"

#include <gtest/gtest.h>

#include <ostream>

#include "ranks/requests.hpp"

namespace expertwire::test {
namespace {

using reference::RoundTripOptions;
using reference::RoutingPattern;
using reference::Workload;

struct Case {
  const char* name;
  int ranks;
  MoeShape shape;
  const char* routing = "uniform";
  int lanes = 1;
  int threads = 1;
  double repeats = 0;
  int ring_frames = 0;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

class HighThroughputRoundTrip : public testing::TestWithParam<Case> {};

TEST_P(HighThroughputRoundTrip, MatchesOracle) {
  const Case& c = GetParam();
  const Workload workload(
      {c.shape, c.ranks, 12, RoutingPattern::parse(c.routing), true, c.repeats});
  Reports reports;
  with_thread_ranks(c.ranks, [&](const std::shared_ptr<Communicator>& communicator) {
    HighThroughputOptions options = with_pool(c.shape, c.lanes, c.threads);
    options.ring_frames = c.ring_frames;
    auto object = HighThroughput::create(communicator, options);
    for (int step = 0; step < 13; ++step) {
      RoundTripOptions how;
      how.output = step % 2 == 0 ? HighThroughput::Output::owned : HighThroughput::Output::pool;
      how.in_place = step % 4 == 1;
      how.weights =
          step % 5 == 4 ? RoundTripOptions::Weights::none : RoundTripOptions::Weights::dispatch;
      how.capacity = step % 3 == 2 ? 0.7 : 0;
      how.preallocated = step % 2 == 0;
      how.weights_home = step % 3 == 0;
      how.cached = step % 4 >= 2;
      how.bias = step % 2 == 1;
      how.wide_ids = step % 3 != 0;
      if (step % 3 != 0 && c.shape.hidden % 16 == 0) how.payload = RoundTripOptions::Payload::fp8;
      reports.add(round_trip(*object, *communicator, workload, step, how));
    }
  });
}

/// Token-major and expert-major operations take turns in one object.
TEST_P(HighThroughputRoundTrip, GroupedByExpertMatchesOracle) {
  const Case& c = GetParam();
  const Workload workload(
      {c.shape, c.ranks, 13, RoutingPattern::parse(c.routing), true, c.repeats});
  Reports reports;
  with_thread_ranks(c.ranks, [&](const std::shared_ptr<Communicator>& communicator) {
    HighThroughputOptions options{c.shape, c.lanes, 0, c.threads};
    options.ring_frames = c.ring_frames;
    auto object = HighThroughput::create(communicator, options);
    for (int step = 0; step < 9; ++step) {
      RoundTripOptions how;
      if (step % 6 != 5) how.layout = HighThroughput::Layout::expert_major;
      how.alignment = step % 4 == 0 ? 1 : step % 4 == 1 ? 3 : step % 4 == 2 ? 16 : 128;
      how.weights =
          step % 5 == 4 ? RoundTripOptions::Weights::none : RoundTripOptions::Weights::dispatch;
      how.capacity = step % 3 == 2 ? 0.7 : step % 7 == 3 ? 1.2 : 0;
      how.preallocated = step % 2 == 0;
      how.weights_home = step % 3 != 1;
      how.cached = step % 4 >= 2;
      how.bias = step % 2 == 1;
      how.wide_ids = step % 3 != 0;
      if (step % 3 != 0 && c.shape.hidden % 16 == 0) how.payload = RoundTripOptions::Payload::fp8;
      reports.add(round_trip(*object, *communicator, workload, step, how));
    }
  });
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, HighThroughputRoundTrip,
    testing::Values(
        Case{"one_rank", 1, {64, 8, 2, 100, DType::bf16}},
        Case{"two_ranks", 2, {256, 8, 4, 100, DType::bf16}},
        Case{"three_ranks", 3, {128, 48, 8, 70, DType::bf16}, "zipf:1.0"},
        Case{"four_ranks_fp32", 4, {128, 64, 8, 65, DType::fp32}},
        Case{"four_ranks_fp16", 4, {136, 64, 8, 65, DType::fp16}},
        Case{"five_ranks", 5, {40, 60, 6, 40, DType::bf16}, "masked:0.4"},
        Case{"six_ranks", 6, {64, 72, 10, 33, DType::bf16}, "hotrank:0.8"},
        Case{"two_lanes", 3, {64, 48, 4, 40, DType::bf16}, "uniform", 2},
        Case{"three_threads", 3, {64, 48, 4, 129, DType::bf16}, "uniform", 1, 3},
        Case{"two_frames", 3, {64, 48, 4, 129, DType::bf16}, "uniform", 1, 1, 0, 2},
        Case{
            "two_frames_of_a_hot_rank", 4, {64, 48, 4, 60, DType::bf16}, "hotrank:0.8", 1, 2, 0, 2},
        Case{"four_frames", 5, {64, 40, 8, 70, DType::bf16}, "zipf:1.0", 2, 3, 0, 4},
        Case{"k1", 4, {64, 16, 1, 64, DType::bf16}}, Case{"k32", 4, {64, 64, 32, 64, DType::bf16}},
        Case{"repeated_experts", 4, {64, 32, 8, 64, DType::bf16}, "uniform", 1, 1, 0.4},
        Case{"hidden_208_fp32", 3, {208, 24, 4, 40, DType::fp32}},
        Case{"hidden_208_fp16", 3, {208, 24, 4, 40, DType::fp16}},
        Case{"hidden_16", 2, {16, 8, 3, 100, DType::bf16}},
        Case{"hidden_2880", 2, {2880, 32, 4, 40, DType::bf16}},
        Case{"many_scales", 2, {16512, 8, 2, 12, DType::bf16}},
        Case{"hidden_2688", 4, {2688, 128, 6, 40, DType::bf16}, "lognormal:1.0"}),
    [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace expertwire::test
