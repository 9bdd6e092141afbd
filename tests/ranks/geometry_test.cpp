// One object, made for the most that it meets, serves calls of other H, dtype, E, K and M, one
// after another and between each other.

#include <gtest/gtest.h>

#include <vector>

#include "ranks/requests.hpp"

namespace expertwire::test {
namespace {

using reference::RoundTripOptions;
using reference::RoutingPattern;
using reference::Workload;
using Payload = RoundTripOptions::Payload;
using Weights = RoundTripOptions::Weights;

constexpr int kRanks = 3;
const MoeShape kMost{320, 48, 6, 40, DType::fp32};

/// From small to large and back, so that what a larger call left behind lies under a smaller one.
const std::vector<MoeShape> kShapes = {
    {320, 48, 6, 40, DType::fp32}, {64, 24, 4, 7, DType::bf16},   {640, 48, 1, 40, DType::fp16},
    {16, 3, 3, 1, DType::fp32},    {256, 36, 6, 33, DType::bf16}, {8, 48, 5, 40, DType::bf16},
    {336, 12, 2, 12, DType::fp16}, {320, 48, 6, 40, DType::bf16},
};

std::vector<Workload> workloads() {
  std::vector<Workload> all;
  for (std::size_t i = 0; i < kShapes.size(); ++i)
    all.emplace_back(
        Workload({kShapes[i], kRanks, 31 + i, RoutingPattern::parse("masked:0.2"), true}));
  return all;
}

TEST(Geometry, LowLatencyChangesFromCallToCall) {
  const std::vector<Workload> all = workloads();
  Reports reports;
  with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
    auto object = LowLatency::create(communicator, {kMost, 2});
    for (int step = 0; step < 48; ++step) {
      const Workload& workload = all[static_cast<std::size_t>(step) % all.size()];
      RoundTripOptions how;
      how.weights = step % 3 == 0 ? Weights::combine : Weights::dispatch;
      how.bias = step % 2 == 0;
      how.split = step % 5 == 0;
      how.preallocated = step % 4 == 1;
      if (workload.spec().shape.hidden % 16 == 0)
        how.payload = step % 7 == 3 ? Payload::cast : step % 7 == 5 ? Payload::fp8 : Payload::plain;
      reports.add(round_trip(*object, *communicator, workload, step, how));
    }
  });
}

/// Places in an output are numbers of 32 bits, on both backends.
TEST(Geometry, OutputsHaveFewerThanTwoToThe31Rows) {
  const MoeShape most{8, 1 << 20, 1, (1 << 11) - 1, DType::bf16};
  EXPECT_GT(LowLatency::memory_bytes({most}, 1), 0U);
  expect_error(ErrorCode::invalid_argument, "shape.experts 1048576 times shape.max_tokens 2048",
               [] {
                 LowLatency::memory_bytes({{8, 1 << 20, 1, 1 << 11, DType::bf16}}, 1);
               });
}

/// Ranks have capacities and budgets of their own in one operation.
TEST(Geometry, RanksDifferInWhatIsTheirOwn) {
  const std::vector<Workload> all = workloads();
  Reports reports;
  with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
    const int rank = communicator->rank();
    HighThroughputOptions options = with_pool(kMost);
    options.threads = 1 + rank;
    options.sms = rank == 0 ? 0 : 1 + 6 * rank;
    auto object = HighThroughput::create(communicator, options);
    for (int step = 0; step < 24; ++step) {
      RoundTripOptions how;
      how.output = step % 2 == 0 ? HighThroughput::Output::pool : HighThroughput::Output::owned;
      how.in_place = (step + rank) % 2 == 0;
      how.preallocated = rank == step % kRanks;
      how.capacity = step % 3 == 2 ? 0.7 : 0;  // of what each needs
      how.weights_home = step % 4 == 1;
      const Workload& workload = all[static_cast<std::size_t>(step) % all.size()];
      reports.add(round_trip(*object, *communicator, workload, step, how));
    }
  });
}

TEST(Geometry, HighThroughputChangesFromCallToCall) {
  const std::vector<Workload> all = workloads();
  Reports reports;
  with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
    auto object = HighThroughput::create(communicator, with_pool(kMost, 2));
    for (int step = 0; step < 48; ++step) {
      const Workload& workload = all[static_cast<std::size_t>(step) % all.size()];
      RoundTripOptions how;
      how.output = step % 2 == 0 ? HighThroughput::Output::pool : HighThroughput::Output::owned;
      how.in_place = step % 4 == 0;
      how.bias = step % 3 == 0;
      how.weights_home = step % 5 == 0;
      how.cached = step % 6 == 1;
      how.capacity = step % 4 == 3 ? 0.8 : 0;
      if (workload.spec().shape.hidden % 16 == 0 && step % 7 == 5) how.payload = Payload::fp8;
      reports.add(round_trip(*object, *communicator, workload, step, how));
    }
  });
}

/// Two dispatches of different shapes before their combines, in the other order.
TEST(Geometry, HandlesKeepTheirs) {
  const std::vector<Workload> all = workloads();
  with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
    auto object = LowLatency::create(communicator, {kMost});
    auto small = LowLatency::create(communicator, {kShapes[1]});
    auto dispatch = [&](LowLatency& to, Request<LowLatency>& request, const MoeShape& shape) {
      request.dispatch.experts = shape.experts;
      request.dispatch.max_tokens = shape.max_tokens;
      return to.dispatch(request.dispatch);
    };
    Request<LowLatency> a(*communicator, all[1], 0), b(*communicator, all[2], 0);
    const auto first = dispatch(*object, a, kShapes[1]), second = dispatch(*object, b, kShapes[2]);
    const auto alone = dispatch(*small, a, kShapes[1]);
    auto combine = [](LowLatency& of, const LowLatency::DispatchResult& result) {
      LowLatency::CombineRequest request;
      request.y = result.outputs.x;
      request.handle = result.handle;
      return of.combine(request);
    };
    combine(*object, second);
    const auto got = combine(*object, first), want = combine(*small, alone);
    auto bytes = [&](const TensorView& view) {
      const TensorView here = a.tensors.download(view);
      return std::vector<std::byte>(here.as<std::byte>(), here.as<std::byte>() + here.bytes());
    };
    EXPECT_EQ(bytes(got.out), bytes(want.out));
  });
}

/// fp8 rows as wide as the object's rows have bytes bring more scales than its own H would.
TEST(Geometry, ScalesOfTheWidestRowsFit) {
  constexpr int kWide = 1200, kScales = 10;
  const MoeShape wide{kWide, 48, 4, 40, DType::bf16};
  const Workload workload({wide, kRanks, 5, RoutingPattern::parse("uniform")});
  const auto byte_of = [](int rank, std::int64_t token, std::int64_t i) {
    return static_cast<std::uint8_t>(rank * 71 + token * 13 + i);
  };
  const auto scale_of = [](int rank, std::int64_t token, std::int64_t i) {
    return static_cast<float>(rank * 10000 + token * 100 + i);
  };
  with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ht = HighThroughput::create(communicator, with_pool(kMost));
    const auto input = workload.input(communicator->rank(), 0);
    const std::int64_t tokens = input.tokens;
    std::vector<std::uint8_t> x;
    std::vector<float> scales;
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (int i = 0; i < kWide; ++i) x.push_back(byte_of(communicator->rank(), t, i));
      for (int i = 0; i < kScales; ++i) scales.push_back(scale_of(communicator->rank(), t, i));
    }
    reference::Tensors tensors(*communicator);
    HighThroughput::DispatchRequest request;
    request.x = tensors.upload({x.data(), DType::fp8_e4m3, {tokens, kWide}});
    request.x_scales = tensors.upload({scales.data(), DType::fp32, {tokens, kScales}});
    request.topk_idx = tensors.upload({input.topk_idx.data(), DType::int64, {tokens, 4}});
    const reference::Oracle oracle(workload, 0);
    const auto& expected = oracle.token_major(communicator->rank());
    const auto check = [&](const HighThroughput::DispatchResult& result) {
      const TensorView rows = tensors.download(result.outputs.x);
      const TensorView beside = tensors.download(result.outputs.scales);
      ASSERT_EQ(rows.size(0), static_cast<std::int64_t>(expected.size()));
      for (std::size_t row = 0; row < expected.size(); ++row) {
        const auto& from = expected[row];
        for (std::size_t i = 0; i < kWide; ++i)
          ASSERT_EQ(rows.as<std::uint8_t>()[row * kWide + i],
                    byte_of(from.source, from.token, static_cast<std::int64_t>(i)));
        for (std::size_t i = 0; i < kScales; ++i)
          ASSERT_EQ(beside.as<float>()[row * kScales + i],
                    scale_of(from.source, from.token, static_cast<std::int64_t>(i)));
      }
    };
    request.output = HighThroughput::Output::pool;  // both slots of the pool at once
    const auto first = ht->dispatch(request), second = ht->dispatch(request);
    check(first);
    check(second);
    ht->release(first.handle);
    ht->release(second.handle);
    request.output = HighThroughput::Output::owned;
    check(ht->dispatch(request));
  });
}

TEST(Geometry, WhatIsTooLargeIsRefused) {
  with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ll = LowLatency::create(communicator, {kMost});
    auto ht = HighThroughput::create(communicator, with_pool(kMost));
    const auto all = workloads();
    auto refuse = [&](const MoeShape& shape, const char* words, int experts, int max_tokens) {
      const Workload workload({shape, kRanks, 3, RoutingPattern::parse("uniform")});
      Request<LowLatency> low(*communicator, workload, 0);
      low.dispatch.experts = experts;
      low.dispatch.max_tokens = max_tokens;
      expect_error(ErrorCode::invalid_argument, words, [&] { ll->dispatch(low.dispatch); });
      if (max_tokens != 0) return;
      Request<HighThroughput> high(*communicator, workload, 0);
      high.dispatch.experts = experts;
      expect_error(ErrorCode::invalid_argument, words, [&] { ht->dispatch(high.dispatch); });
    };
    refuse({324, 48, 6, 40, DType::fp32}, "rows of 1296 bytes with their scales", 0, 0);
    refuse({648, 48, 6, 40, DType::bf16}, "at most 1280 (shape.hidden 320 of fp32)", 0, 0);
    refuse({64, 48, 7, 40, DType::bf16}, "K must be from 1 to shape.top_k = 6", 0, 0);
    refuse({64, 48, 6, 41, DType::bf16}, "at most max_tokens = 40", 0, 0);
    refuse({64, 48, 6, 40, DType::bf16}, "experts is 51", 51, 0);
    refuse({64, 48, 6, 40, DType::bf16}, "experts is 46", 46, 0);
    refuse({64, 48, 6, 40, DType::bf16}, "at most max_tokens = 39", 0, 39);
    refuse({64, 48, 6, 40, DType::bf16}, "max_tokens is 41", 0, 41);
    // None of it consumed an operation.
    EXPECT_EQ(round_trip(*ll, *communicator, all[1], 0, {}).wrong, 0);
    EXPECT_EQ(round_trip(*ht, *communicator, all[1], 0, {}).wrong, 0);
  });
}

/// Ranks that bring other sizes: an error that names both.
TEST(Geometry, RanksBringTheSame) {
  const struct {
    MoeShape odd;
    const char* words;
  } kCases[] = {{{72, 24, 4, 8, DType::bf16}, "of 72"},
                {{64, 12, 4, 8, DType::bf16}, "4 of 12"},
                {{64, 24, 3, 8, DType::bf16}, "3 of 24"},
                {{64, 24, 4, 9, DType::bf16}, "has max_tokens"},
                {{64, 24, 4, 8, DType::fp16}, "of fp16"}};
  for (const auto& [odd, words] : kCases)
    with_thread_ranks(2, [&, &odd = odd,
                          &words = words](const std::shared_ptr<Communicator>& communicator) {
      const MoeShape shape = communicator->rank() == 1 ? odd : MoeShape{64, 24, 4, 8, DType::bf16};
      const Workload workload({shape, 2, 3, RoutingPattern::parse("uniform")});
      auto ll = LowLatency::create(communicator, {{128, 48, 6, 40, DType::fp32}});
      Request<LowLatency> low(*communicator, workload, 0);
      low.dispatch.experts = shape.experts;
      low.dispatch.max_tokens = shape.max_tokens;
      expect_error(ErrorCode::mismatch, words, [&] { ll->dispatch(low.dispatch); });
      if (odd.max_tokens == 9) return;
      auto ht = HighThroughput::create(communicator, {{128, 48, 6, 40, DType::fp32}});
      Request<HighThroughput> high(*communicator, workload, 0);
      high.dispatch.experts = shape.experts;
      expect_error(ErrorCode::mismatch, words, [&] { ht->dispatch(high.dispatch); });
    });
}

}  // namespace
}  // namespace expertwire::test
