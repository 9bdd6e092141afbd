// Pairs of ranks that reach each other through host memory: the same values, beside mapped pairs in
// the same operations.

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <array>
#include <string>
#include <vector>

#include "comm/communicator_access.hpp"
#include "gpu/buffers.hpp"
#include "ranks/requests.hpp"

namespace expertwire::test {
namespace {

using reference::RoundTripOptions;
using reference::RoutingPattern;
using reference::Workload;

CommunicatorOptions staged(const std::string& pairs) {
  CommunicatorOptions options = small_arena();
  options.staged_pairs = pairs;
  return options;
}

struct Case {
  const char* name;
  int ranks;
  const char* pairs;
  MoeShape shape;
  const char* routing = "uniform";
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

class StagedRoundTrip : public testing::TestWithParam<Case> {};

TEST_P(StagedRoundTrip, LowLatencyMatchesOracle) {
  using W = RoundTripOptions::Weights;
  using P = RoundTripOptions::Payload;
  const Case& c = GetParam();
  const Workload workload({c.shape, c.ranks, 5, RoutingPattern::parse(c.routing), true});
  Reports reports;
  with_thread_ranks(
      c.ranks,
      [&](const std::shared_ptr<Communicator>& communicator) {
        LowLatencyOptions made{c.shape};
        made.lanes = 2;
        made.sms = 2 + communicator->rank() % 3 * 4;
        auto object = LowLatency::create(communicator, made);
        for (int step = 0; step < 18; ++step) {
          RoundTripOptions how;
          how.weights = std::array{W::dispatch, W::combine, W::none}[step % 3];
          how.split = step % 4 == 1;
          how.bias = step % 2 == 1;
          if (c.shape.hidden % 16 == 0)
            how.payload = std::array{P::plain, P::cast, P::fp8}[step / 3 % 3];
          reports.add(round_trip(*object, *communicator, workload, step, how));
        }
      },
      staged(c.pairs));
}

TEST_P(StagedRoundTrip, HighThroughputMatchesOracle) {
  const Case& c = GetParam();
  const Workload workload({c.shape, c.ranks, 6, RoutingPattern::parse(c.routing), true});
  Reports reports;
  with_thread_ranks(
      c.ranks,
      [&](const std::shared_ptr<Communicator>& communicator) {
        for (const int frames : {2, 0}) {
          HighThroughputOptions made{c.shape};
          made.lanes = 2;
          made.ring_frames = frames;
          made.sms = 2 + communicator->rank() % 3 * 4;
          auto object = HighThroughput::create(communicator, made);
          for (int step = 0; step < 12; ++step) {
            RoundTripOptions how;
            how.capacity = step % 4 == 1 ? 0.6 : 0;
            how.cached = step % 3 == 1;
            how.weights_home = step % 2 == 1;
            how.bias = step % 3 == 2;
            if (step % 4 == 3 && c.shape.hidden % 16 == 0)
              how.payload = RoundTripOptions::Payload::fp8;
            reports.add(round_trip(*object, *communicator, workload, step, how));
          }
        }
      },
      staged(c.pairs));
}

INSTANTIATE_TEST_SUITE_P(
    Pairs, StagedRoundTrip,
    testing::Values(
        Case{"two_ranks", 2, "all", {256, 8, 4, 32, DType::bf16}},
        Case{"three_ranks_one_pair", 3, "1-2", {128, 48, 8, 20, DType::bf16}, "zipf:1.0"},
        Case{"four_ranks_two_pairs", 4, "0-1,2-3", {208, 64, 8, 40, DType::fp32}},
        Case{"four_ranks_all", 4, "all", {136, 64, 8, 20, DType::fp16}, "masked:0.4"},
        Case{"six_ranks_hot", 6, "0-1,0-2,3-5", {64, 72, 10, 33, DType::bf16}, "hotrank:0.9"},
        Case{"model_shape", 2, "all", {7168, 32, 8, 150, DType::bf16}}),
    [](const auto& test) { return std::string(test.param.name); });

/// Both ranks of a pair know it, though one alone asks; and the others know that there is one.
TEST(Staged, RanksAgreeOnTheirPaths) {
  const Workload workload = workload_for(3);
  Reports reports;
  run_in_process(3, [&](std::shared_ptr<Bootstrap> bootstrap) {
    const int rank = bootstrap->rank();
    CommunicatorOptions options = staged(rank == 2 ? "0-2" : "none");
    options.cuda_device = cuda_device_of(rank);
    const auto communicator = Communicator::create(std::move(bootstrap), options);
    for (int peer = 0; peer < 3; ++peer)
      EXPECT_EQ(communicator->path(peer).kind,
                rank != 1 && peer == 2 - rank ? PathKind::staged : PathKind::mapped)
          << rank << " to " << peer;
    EXPECT_TRUE(communicator->staged_pair().has_value());
    if (rank == 0) {
      EXPECT_EQ(communicator->path(2).why, "rank 2 asks for it");
    }
    if (rank == 2) {
      EXPECT_NE(communicator->banner().find("staged"), std::string::npos);
    }

    // No rank hangs for what one of them must refuse.
    expect_error(ErrorCode::unsupported, "0 and 2 reach each other through host memory",
                 [&] { HighThroughput::create(communicator, with_pool(kShape)); });
    auto object = HighThroughput::create(communicator, {kShape});
    for (int step = 0; step < 3; ++step)
      reports.add(round_trip(*object, *communicator, workload, step, {}));
  });
}

TEST(Staged, RefusesWhatCannotPass) {
  with_thread_ranks(
      2,
      [&](const std::shared_ptr<Communicator>& communicator) {
        const int peer = 1 - communicator->rank();
        PutRequest put;
        put.destination = communicator->arena().part(peer);
        put.source = communicator->arena().local();
        put.bytes = 16;
        expect_error(ErrorCode::unsupported, "host memory alone",
                     [&] { communicator->connection(peer).put(put); });
        auto object = LowLatency::create(communicator, {kShape});
        Request<LowLatency> request(*communicator, workload_for(2), 1);
        request.dispatch.sms = 1;
        expect_error(ErrorCode::invalid_argument, "must be from 2 to",
                     [&] { object->dispatch(request.dispatch); });
        EXPECT_EQ(round_trip(*object, *communicator, workload_for(2), 2, {}).wrong, 0);
        communicator->barrier();
      },
      staged("all"));
}

/// Host memory that an object has used is used again, with words as new.
TEST(Staged, ObjectsComeAndGo) {
  const Workload workload = workload_for(3);
  Reports reports;
  with_thread_ranks(
      3,
      [&](const std::shared_ptr<Communicator>& communicator) {
        std::size_t most = 0;
        for (int round = 0; round < 40; ++round) {
          auto low = LowLatency::create(communicator, {kShape});
          auto high = HighThroughput::create(communicator, {kShape});
          for (int step = 0; step < 1 + round % 2; ++step) {
            reports.add(round_trip(*low, *communicator, workload, step, {}));
            reports.add(round_trip(*high, *communicator, workload, step, {}));
          }
          low.reset();
          high.reset();
          communicator->barrier();
          const std::size_t carved = CommunicatorAccess::staging(*communicator).carved();
          if (round <= 2) most = carved;
          EXPECT_LE(carved, most);
          communicator->barrier();
        }
      },
      staged("0-1,1-2"));
}

/// Callers synchronize their devices while operations are on their way. Ranks that share a device
/// wait for each other there, so all have given their part first.
TEST(Staged, ADeviceSynchronisationReturns) {
  const Workload workload = workload_for(2);
  std::atomic<int> wrong{0};
  with_thread_ranks(
      2,
      [&](const std::shared_ptr<Communicator>& communicator) {
        Buffers buffers(communicator->cuda_device());
        auto object = LowLatency::create(communicator, {kShape});
        Request<LowLatency> request(*communicator, workload, 1);
        const auto first = object->dispatch(request.dispatch);
        LowLatency::CombineRequest combine;
        combine.handle = first.handle;
        combine.y = first.outputs.x;
        const auto wanted = buffers.download(object->combine(combine).out);
        request.dispatch.stream = combine.stream = Stream::cuda(buffers.stream());
        for (int round = 0; round < 50; ++round) {
          const auto again = object->dispatch(request.dispatch);
          if (round % 3 == 0) {
            communicator->barrier();
            if (round % 2 == communicator->rank())
              check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
          }
          combine.handle = again.handle;
          combine.y = again.outputs.x;
          const auto out = object->combine(combine).out;
          communicator->barrier();
          check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
          if (buffers.download(out) != wanted) ++wrong;
        }
        communicator->barrier();
      },
      staged("all"));
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace expertwire::test
