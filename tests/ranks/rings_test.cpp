// Rings of two frames, which are full at once: nobody waits in a circle, and nothing is lost.

#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "ep/cpu/rings.hpp"
#include "ranks/requests.hpp"

namespace expertwire::test {
namespace {

using reference::RoundTripOptions;
using reference::Workload;

class FullRings : public testing::TestWithParam<int> {};

/// Every routing pattern, budgets of every rank's own, one rank late in every step.
TEST_P(FullRings, NobodyWaitsInACircle) {
  const int ranks = GetParam();
  const MoeShape shape{64, ranks * 6, 4, 37, DType::bf16};
  Reports reports;
  CommunicatorOptions memory = small_arena();
  memory.timeout = std::chrono::milliseconds(20000);
  with_thread_ranks(
      ranks,
      [&](const std::shared_ptr<Communicator>& communicator) {
        const int rank = communicator->rank();
        HighThroughputOptions options{shape};
        options.ring_frames = 2;
        options.threads = 1 + rank % 3;
        options.sms = rank % 4 == 0 ? 0 : 2 * rank - 1;
        auto object = HighThroughput::create(communicator, options);
        int step = 0;
        for (const char* routing :
             {"uniform", "balanced", "lognormal:1.0", "powerlaw:1.01", "zipf:0.8", "hotrank:0.7",
              "hotrank:1.0", "grouped:2,1", "masked:0.3", "masked:1.0"}) {
          const Workload workload(
              {shape, ranks, 3, reference::RoutingPattern::parse(routing), true});
          for (int i = 0; i < 5; ++i, ++step) {
            RoundTripOptions how;
            how.weights_home = i == 1 || i == 3;
            how.capacity = i == 2 || i == 4 ? 0.7 : 0;
            how.cached = i == 0;
            if (i >= 3) how.layout = HighThroughput::Layout::expert_major;
            if (rank == step % ranks) std::this_thread::sleep_for(std::chrono::milliseconds(3));
            reports.add(round_trip(*object, *communicator, workload, step, how));
          }
        }
      },
      memory);
}

INSTANTIATE_TEST_SUITE_P(Ranks, FullRings, testing::Range(2, 9),
                         [](const auto& test) { return "r" + std::to_string(test.param); });

/// Without a pool an object knows no bound on tokens, and its memory none.
TEST(Rings, KnowNoBoundOnTokens) {
  const MoeShape unbounded{64, 12, 3, 0, DType::bf16};
  Reports reports;
  with_thread_ranks(3, [&](const std::shared_ptr<Communicator>& communicator) {
    auto object = HighThroughput::create(communicator, {unbounded});
    const std::size_t before = communicator->arena().carved();
    for (const int tokens : {1, 40, 700, 9000, 3}) {
      MoeShape shape = unbounded;
      shape.max_tokens = tokens;
      const Workload workload({shape, 3, 3, reference::RoutingPattern::parse("uniform"), true});
      for (int step = 0; step < 3; ++step) {
        RoundTripOptions how;
        how.cached = step == 1;
        how.capacity = step == 2 ? 0.5 : 0;
        reports.add(round_trip(*object, *communicator, workload, step, how));
      }
    }
    EXPECT_EQ(communicator->arena().carved(), before);
  });
  EXPECT_LT(HighThroughput::memory_bytes({unbounded}, 3), std::size_t{40} << 20);
}

/// A role that never moves, and learns at which peer it stands when it is asked to.
struct Stuck {
  ep::cpu::Standing at{-1, 0};
  int steps = 0;
  bool done() const { return false; }
  ep::cpu::Standing waits_for() const { return at; }
  bool step() {
    at = ++steps < 5 ? ep::cpu::Standing{0, 3} : ep::cpu::Standing{1, 7};
    return false;
  }
};
struct Done {
  bool done() const { return true; }
  ep::cpu::Standing waits_for() const { return {-1, 0}; }
  bool step() { return false; }
};

TEST(Rings, AWaitNamesThePeerThatItStandsAt) {
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    const WaitContext context{communicator.get(), Deadline::after(std::chrono::milliseconds(50)),
                              "an operation"};
    Done done;
    Stuck stuck;
    expect_error(ErrorCode::timeout, "for rank 1 (row 7)",
                 [&] { ep::cpu::run_both(done, stuck, Phase::combine_rows, context); });
    communicator->barrier();
  });
}

TEST(Rings, AnObjectWithoutAPoolHasNone) {
  const Workload workload = workload_for(2);
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    auto object = HighThroughput::create(communicator, {kShape});
    Request<HighThroughput> request(*communicator, workload, 1);
    request.dispatch.output = HighThroughput::Output::pool;
    expect_error(ErrorCode::invalid_argument, "made without a pool",
                 [&] { object->dispatch(request.dispatch); });
    EXPECT_EQ(round_trip(*object, *communicator, workload, 2, {}).wrong, 0);
  });
  HighThroughputOptions options{kShape};
  for (const int frames : {1, 3, -2, 8192}) {
    options.ring_frames = frames;
    expect_error(ErrorCode::invalid_argument, "ring_frames is",
                 [&] { HighThroughput::memory_bytes(options, 2); });
  }
  options = {kShape};
  options.pool_rows = HighThroughputOptions::kEveryRow;
  options.shape.max_tokens = 0;
  expect_error(ErrorCode::invalid_argument, "max_tokens is 0",
               [&] { HighThroughput::memory_bytes(options, 2); });
}

/// What an owned output had room for need not fit into the pool.
TEST(Rings, ACachedDispatchDoesNotOverrunThePool) {
  const Workload workload = workload_for(2);
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    HighThroughputOptions options{kShape};
    options.pool_rows = 8;
    auto object = HighThroughput::create(communicator, options);
    Request<HighThroughput> request(*communicator, workload, 1);
    const auto owned = object->dispatch(request.dispatch);
    auto again = request.dispatch;
    again.topk_idx = {};
    again.cached = owned.handle;
    again.output = HighThroughput::Output::pool;
    expect_error(ErrorCode::invalid_argument, "the pool has 8", [&] { object->dispatch(again); });
    again.output = HighThroughput::Output::owned;
    const auto cached = object->dispatch(again);
    again.cached = cached.handle;  // a handle of a handle remembers
    again.output = HighThroughput::Output::pool;
    expect_error(ErrorCode::invalid_argument, "the pool has 8", [&] { object->dispatch(again); });
    EXPECT_EQ(round_trip(*object, *communicator, workload, 2, {}).wrong, 0);
  });
}

TEST(Rings, RanksThatLeaveRowsInDifferentPlacesAreToldSo) {
  const Workload workload = workload_for(2);
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    auto object = HighThroughput::create(communicator, with_pool(kShape));
    Request<HighThroughput> request(*communicator, workload, 1);
    if (communicator->rank() == 0) request.dispatch.output = HighThroughput::Output::pool;
    expect_error(ErrorCode::mismatch, "owns its output",
                 [&] { object->dispatch(request.dispatch); });
  });
}

/// An allocator that gives nothing is an error of its rank alone: rows are let through.
TEST(Rings, LetRowsThroughThatHaveNoPlace) {
  const Workload workload = workload_for(2);
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    HighThroughputOptions options{kShape};
    options.ring_frames = 2;
    auto object = HighThroughput::create(communicator, options);
    Request<HighThroughput> request(*communicator, workload, 1);
    auto nothing = [&](const AllocationRequest& asked) -> Allocation {
      if (asked.name == "handle") return request.tensors.allocator()(asked);
      throw Error(ErrorCode::capacity, "no memory for outputs");
    };
    if (communicator->rank() == 0) {
      request.dispatch.allocator = Allocator::of(nothing);
      expect_error(ErrorCode::capacity, "no memory", [&] { object->dispatch(request.dispatch); });
    } else {
      object->dispatch(request.dispatch);
    }
    for (int step = 2; step < 6; ++step)
      EXPECT_EQ(round_trip(*object, *communicator, workload, step, {}).wrong, 0);
  });
}

}  // namespace
}  // namespace expertwire::test
