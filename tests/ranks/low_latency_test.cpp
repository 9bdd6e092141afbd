#include "expertwire/low_latency.hpp"

#include <gtest/gtest.h>

#include <array>
#include <ostream>

#include "ranks/thread_ranks.hpp"

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
  RoundTripOptions::Weights weights = RoundTripOptions::Weights::dispatch;
  int lanes = 1;
  int threads = 1;
  double repeats = 0;
};

using P = RoundTripOptions::Payload;
constexpr std::array kPayloads = {P::plain, P::cast, P::fp8};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

class LowLatencyRoundTrip : public testing::TestWithParam<Case> {};

TEST_P(LowLatencyRoundTrip, MatchesOracle) {
  const Case& c = GetParam();
  const Workload workload(
      {c.shape, c.ranks, 11, RoutingPattern::parse(c.routing), true, c.repeats});
  Reports reports;
  with_thread_ranks(c.ranks, [&](const std::shared_ptr<Communicator>& communicator) {
    auto object = LowLatency::create(communicator, {c.shape, c.lanes, c.threads});
    for (int step = 0; step < 7; ++step) {
      RoundTripOptions options;
      options.weights = c.weights;
      options.bias = step % 2 == 1;
      options.wide_ids = step % 3 != 0;
      options.preallocated = step % 2 == 0;
      options.split = step % 3 == 1;
      if (c.shape.hidden % 16 == 0) options.payload = kPayloads[static_cast<std::size_t>(step) % 3];
      reports.add(round_trip(*object, *communicator, workload, step, options));
    }
  });
}

using W = RoundTripOptions::Weights;
INSTANTIATE_TEST_SUITE_P(
    Shapes, LowLatencyRoundTrip,
    testing::Values(
        Case{"one_rank", 1, {64, 8, 2, 16, DType::bf16}},
        Case{"two_ranks", 2, {256, 8, 4, 32, DType::bf16}},
        Case{"three_ranks", 3, {128, 48, 8, 20, DType::bf16}, "zipf:1.0"},
        Case{"four_ranks_fp32", 4, {128, 64, 8, 20, DType::fp32}},
        Case{"four_ranks_fp16", 4, {136, 64, 8, 20, DType::fp16}},
        Case{"five_ranks", 5, {40, 60, 6, 9, DType::bf16}, "masked:0.4"},
        Case{"six_ranks", 6, {64, 72, 10, 12, DType::bf16}, "hotrank:0.8"},
        Case{"weights_at_combine", 4, {128, 64, 8, 20, DType::bf16}, "uniform", W::combine},
        Case{"no_weights", 3, {128, 48, 4, 20, DType::bf16}, "uniform", W::none},
        Case{"two_lanes", 3, {64, 48, 4, 16, DType::bf16}, "uniform", W::dispatch, 2},
        Case{"three_threads", 3, {64, 48, 4, 33, DType::bf16}, "uniform", W::combine, 1, 3},
        Case{"k1", 4, {64, 16, 1, 16, DType::bf16}}, Case{"k32", 4, {64, 64, 32, 16, DType::bf16}},
        Case{
            "repeated_experts", 4, {64, 32, 8, 16, DType::bf16}, "uniform", W::dispatch, 1, 1, 0.4},
        Case{"hidden_208_fp32", 3, {208, 24, 4, 16, DType::fp32}},
        Case{"hidden_208_fp16", 3, {208, 24, 4, 16, DType::fp16}},
        Case{"hidden_16", 2, {16, 8, 3, 40, DType::bf16}},
        Case{"hidden_2880", 2, {2880, 32, 4, 8, DType::bf16}},
        Case{"hidden_2688", 4, {2688, 128, 6, 8, DType::bf16}, "lognormal:1.0"},
        Case{"k22", 4, {1024, 512, 22, 8, DType::bf16}}),
    [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace expertwire::test
