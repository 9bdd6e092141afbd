// What both modes promise besides right values: errors, handles, lanes, streams, shapes.

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "ranks/requests.hpp"

namespace expertwire::test {
namespace {

using reference::RankInput;
using reference::RoundTripOptions;
using reference::RoutingPattern;
using reference::Workload;

TEST(Contract, BadInputConsumesNoOperation) {
  const Workload workload = workload_for(3);
  Reports reports;
  with_thread_ranks(3, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ll = LowLatency::create(communicator, {kShape, 2});
    auto ht = HighThroughput::create(communicator, {kShape, 2});
    for (int step = 0; step < 4; ++step) {
      // On one rank only: were an operation consumed, the others would wait for it.
      if (communicator->rank() == step % 3) {
        Request<LowLatency> bad(workload, 0, step);
        bad.dispatch.topk_idx = {};
        expect_error(ErrorCode::invalid_argument, "topk_idx is absent",
                     [&] { ll->dispatch(bad.dispatch); });
        Request<LowLatency> none(workload, 0, step);
        none.dispatch.sms = -1;
        expect_error(ErrorCode::invalid_argument, "sms is -1",
                     [&] { ll->dispatch(none.dispatch); });
        Request<HighThroughput> worse(workload, 0, step);
        worse.dispatch.capacity = 1'000'000;
        expect_error(ErrorCode::invalid_argument, "capacity is 1000000",
                     [&] { ht->dispatch(worse.dispatch); });
      }
      reports.add(round_trip(*ll, *communicator, workload, step, {}));
      reports.add(round_trip(*ht, *communicator, workload, step, {}));
    }
  });
}

TEST(Contract, RanksMustAgreeOnTheShape) {
  with_thread_ranks(3, [&](const std::shared_ptr<Communicator>& communicator) {
    MoeShape shape = kShape;
    if (communicator->rank() == 2) shape.max_tokens = 64;
    expect_error(ErrorCode::mismatch, "shape.max_tokens",
                 [&] { LowLatency::create(communicator, {shape}); });
    communicator->barrier();
    EXPECT_EQ(communicator->arena().carved(), 0U);
  });
}

TEST(Contract, HandlesBelongToTheirObject) {
  const Workload workload = workload_for(2);
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    auto a = LowLatency::create(communicator, {kShape});
    auto b = LowLatency::create(communicator, {kShape});
    auto ht = HighThroughput::create(communicator, {kShape});
    Request<LowLatency> request(workload, communicator->rank(), 0);
    const auto result = a->dispatch(request.dispatch);
    LowLatency::CombineRequest combine;
    combine.y = result.outputs.x;
    expect_error(ErrorCode::invalid_usage, "handle is empty", [&] { a->combine(combine); });
    combine.handle = result.handle;
    expect_error(ErrorCode::invalid_usage, "made by another object", [&] { b->combine(combine); });
    HighThroughput::CombineRequest other;
    other.handle = result.handle;
    expect_error(ErrorCode::invalid_usage, "made by another object", [&] { ht->combine(other); });
    a->combine(combine);
  });
}

// A handle owns its routing: two dispatches later, and twice, it still combines right.
TEST(Contract, HandlesOutliveLaterDispatches) {
  const Workload workload = workload_for(3);
  with_thread_ranks(3, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ht = HighThroughput::create(communicator, {kShape});
    std::vector<Request<HighThroughput>> requests;
    std::vector<HighThroughput::DispatchResult> results;
    for (int step = 0; step < 5; ++step)
      requests.emplace_back(workload, communicator->rank(), step);
    for (int step = 0; step < 5; ++step) {
      auto& request = requests[static_cast<std::size_t>(step)];
      request.dispatch.topk_weights = {};
      results.push_back(ht->dispatch(request.dispatch));
    }
    for (int round = 0; round < 2; ++round)
      for (std::size_t step : {3U, 0U, 4U, 1U, 2U}) {
        HighThroughput::CombineRequest combine;
        combine.y = results[step].outputs.x;
        combine.handle = results[step].handle;
        const auto out = ht->combine(combine);
        // Every rank that had a token returns it unchanged: the sum is count times the row.
        const reference::Oracle oracle(workload, static_cast<int>(step));
        const RankInput& input = requests[step].input;
        for (int t = 0; t < input.tokens; ++t) {
          std::vector<bool> ranks(3, false);
          for (int k = 0; k < kShape.top_k; ++k) {
            const auto id = input.topk_idx[static_cast<std::size_t>(t * kShape.top_k + k)];
            if (id >= 0) ranks[static_cast<std::size_t>(id / 8)] = true;
          }
          const auto count = static_cast<float>(std::count(ranks.begin(), ranks.end(), true));
          const auto row = static_cast<std::size_t>(t) * kShape.row_bytes();
          const auto x = reference::decode(kShape.dtype, input.x.data() + row, 64);
          const auto y = reference::decode(kShape.dtype, out.out.as<std::byte>() + row, 64);
          for (std::size_t h = 0; h < 64; ++h)
            ASSERT_EQ(y[h], reference::round_to(DType::bf16, count * x[h]));
        }
      }
  });
}

TEST(Contract, AFullPoolIsAnErrorOnEveryRankAndTheObjectWorksOn) {
  const Workload workload = workload_for(3);
  Reports reports;
  std::atomic<int> refused{0};
  with_thread_ranks(3, [&](const std::shared_ptr<Communicator>& communicator) {
    HighThroughputOptions options{kShape, 1, 40};
    auto ht = HighThroughput::create(communicator, options);
    for (int step = 0; step < 12; ++step) {
      const reference::Oracle oracle(workload, step);
      std::size_t most = 0;
      for (int r = 0; r < 3; ++r) most = std::max(most, oracle.token_major(r).size());
      if (most <= 40) {
        reports.add(round_trip(*ht, *communicator, workload, step, {}));
        continue;
      }
      Request<HighThroughput> request(workload, communicator->rank(), step);
      request.dispatch.output =
          step % 2 == 0 ? HighThroughput::Output::pool : HighThroughput::Output::owned;
      expect_error(ErrorCode::capacity, "40 rows", [&] { ht->dispatch(request.dispatch); });
      ++refused;
    }
  });
  EXPECT_GT(refused, 0);
}

TEST(Contract, PoolRowsThatAreHeldAreNotOverwritten) {
  const Workload workload = workload_for(2);
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ht = HighThroughput::create(communicator, {kShape});
    auto pool_dispatch = [&](int step) {
      Request<HighThroughput> request(workload, communicator->rank(), step);
      request.dispatch.output = HighThroughput::Output::pool;
      return ht->dispatch(request.dispatch);
    };
    auto first = pool_dispatch(0), second = pool_dispatch(1);
    expect_error(ErrorCode::invalid_usage, "still held", [&] { pool_dispatch(2); });
    // Released out of order: the credit of the second waits for the first.
    ht->release(second.handle);
    expect_error(ErrorCode::invalid_usage, "still held", [&] { pool_dispatch(2); });
    ht->release(first.handle);
    ht->release(first.handle);  // once more does nothing
    first = pool_dispatch(2);
    second = pool_dispatch(3);
    // Handles that nobody holds any more are released by the lane.
    first = {};
    second = {};
    for (int step = 4; step < 10; ++step) pool_dispatch(step);
  });
}

TEST(Contract, PoolRowsCombineInPlaceOnce) {
  const Workload workload = workload_for(2);
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ht = HighThroughput::create(communicator, {kShape});
    Request<HighThroughput> request(workload, communicator->rank(), 1);
    request.dispatch.output = HighThroughput::Output::pool;
    const auto result = ht->dispatch(request.dispatch);
    HighThroughput::CombineRequest combine;
    combine.y = result.outputs.x;
    combine.handle = result.handle;
    ht->combine(combine);
    expect_error(ErrorCode::invalid_usage, "released already", [&] { ht->combine(combine); });
  });
}

TEST(Contract, IdsOutOfRangeAreReportedAndCountAsNone) {
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ll = LowLatency::create(communicator, {kShape});
    EXPECT_EQ(ll->status().invalid_expert_ids, 0);
    std::vector<std::byte> x(kShape.row_bytes(), std::byte{1});
    std::vector<std::int32_t> ids = {0, 24, -7, -1};
    LowLatency::DispatchRequest request;
    request.x = {x.data(), DType::bf16, {1, 64}};
    request.topk_idx = {ids.data(), DType::int32, {1, 4}};
    const auto result = ll->dispatch(request);
    std::int32_t rows = 0;
    for (int e = 0; e < 12; ++e) rows += result.outputs.tokens_per_expert.as<std::int32_t>()[e];
    EXPECT_EQ(rows, communicator->rank() == 0 ? 2 : 0);
    EXPECT_EQ(ll->status().invalid_expert_ids, 2);
    EXPECT_EQ(ll->status().first_invalid_id, "topk_idx[0, 1] = 24");
    EXPECT_TRUE(ll->status().failure.empty());
  });
}

TEST(Contract, AllocatorThatThrowsEndsTheCallAndNothingElse) {
  const Workload workload = workload_for(2);
  Reports reports;
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ht = HighThroughput::create(communicator, {kShape});
    Request<HighThroughput> request(workload, communicator->rank(), 0);
    if (communicator->rank() == 1)
      request.dispatch.allocator = [](const AllocationRequest&) -> Allocation {
        throw std::runtime_error("no memory today");
      };
    try {
      ht->dispatch(request.dispatch);
      EXPECT_EQ(communicator->rank(), 0);
    } catch (const std::runtime_error& error) {
      EXPECT_EQ(communicator->rank(), 1);
      EXPECT_STREQ(error.what(), "no memory today");
    }
    for (int step = 0; step < 3; ++step)
      reports.add(round_trip(*ht, *communicator, workload, step, {}));
  });
}

// Streams and lanes ----------------------------------------------------------------------------

/// Results on a stream equal those of plain calls, in three orders over two streams and two lanes.
TEST(Contract, TwoLanesOnTwoStreamsInEveryOrder) {
  const int ranks = 3;
  const Workload workload = workload_for(ranks);
  with_thread_ranks(ranks, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ll = LowLatency::create(communicator, {kShape, 2});
    auto plain = LowLatency::create(communicator, {kShape});
    Stream streams[2];
    // D: dispatch, C: combine; the digit is the micro-batch, which has its own stream.
    for (const char* order : {"D0D1C0C1", "D0D1C1C0", "D0C0D1C1"}) {
      std::vector<Request<LowLatency>> requests;
      requests.emplace_back(workload, communicator->rank(), 5);
      requests.emplace_back(workload, communicator->rank(), 6);
      std::vector<LowLatency::DispatchResult> dispatched(2);
      std::vector<LowLatency::CombineResult> combined(2);
      for (const char* step = order; *step != '\0'; step += 2) {
        const auto batch = static_cast<std::size_t>(step[1] - '0');
        auto& request = requests[batch];
        request.dispatch.stream = &streams[batch];
        if (step[0] == 'D') {
          dispatched[batch] = ll->dispatch(request.dispatch);
        } else {
          LowLatency::CombineRequest combine;
          combine.y = dispatched[batch].outputs.x;
          combine.handle = dispatched[batch].handle;
          combine.stream = &streams[batch];
          combined[batch] = ll->combine(combine);
        }
      }
      for (Stream& stream : streams) stream.synchronize();
      for (std::size_t batch : {0U, 1U}) {
        auto& request = requests[batch].dispatch;
        request.stream = nullptr;
        const auto again = plain->dispatch(request);
        LowLatency::CombineRequest combine;
        combine.y = again.outputs.x;
        combine.handle = again.handle;
        const auto want = plain->combine(combine);
        ASSERT_EQ(want.out.bytes(), combined[batch].out.bytes());
        EXPECT_EQ(std::memcmp(want.out.data(), combined[batch].out.data(), want.out.bytes()), 0);
      }
    }
  });
}

/// One lane's operation waits for a late rank; the other lane's goes on meanwhile.
TEST(Contract, LanesDoNotWaitForEachOther) {
  const Workload workload = workload_for(2);
  std::atomic<bool> second_done[2] = {false, false};
  std::atomic<bool> first_sent{false};
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    const int rank = communicator->rank();
    auto ht = HighThroughput::create(communicator, {kShape, 2});
    Stream first_stream, second_stream;
    Request<HighThroughput> first(workload, rank, 2), second(workload, rank, 3);
    first.dispatch.capacity = second.dispatch.capacity = 64;
    first.dispatch.stream = &first_stream;
    second.dispatch.stream = &second_stream;
    // Rank 1's first stream is held up until the second lane is through on both ranks.
    if (rank == 1)
      first_stream.enqueue([&] {
        const auto deadline = Deadline::after(std::chrono::seconds(10));
        while (!(second_done[0] && second_done[1]) && !deadline.expired())
          std::this_thread::yield();
        EXPECT_TRUE(second_done[0] && second_done[1]);
        first_sent = true;
      });
    const auto a = ht->dispatch(first.dispatch);
    const auto b = ht->dispatch(second.dispatch);
    second_stream.synchronize();
    second_done[rank] = true;
    first_stream.synchronize();
    EXPECT_TRUE(first_sent);
    const auto needed = [&](int step) {
      return static_cast<std::int32_t>(reference::Oracle(workload, step).token_major(rank).size());
    };
    EXPECT_EQ(*a.needed_rows.as<std::int32_t>(), needed(2));
    EXPECT_EQ(*b.needed_rows.as<std::int32_t>(), needed(3));
  });
}

// Letting go ------------------------------------------------------------------------------------

/// Objects and results may go while their work is still queued: it runs, into memory that is there.
TEST(Contract, ObjectsWaitForTheirQueuedWork) {
  const Workload workload = workload_for(2);
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    Stream stream;
    Request<HighThroughput> request(workload, communicator->rank(), 1);
    Request<LowLatency> other(workload, communicator->rank(), 1);
    stream.enqueue([] { std::this_thread::sleep_for(std::chrono::milliseconds(30)); });
    {
      auto ht = HighThroughput::create(communicator, {kShape});
      auto ll = LowLatency::create(communicator, {kShape});
      request.dispatch.capacity = 64;
      request.dispatch.stream = &stream;
      other.dispatch.stream = &stream;
      ht->dispatch(request.dispatch);
      ll->dispatch(other.dispatch);
    }
    stream.synchronize();
  });
}

TEST(Contract, CapacityIsGivenByAllRanksOrNone) {
  const Workload workload = workload_for(2);
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ht = HighThroughput::create(communicator, {kShape});
    Request<HighThroughput> request(workload, communicator->rank(), 1);
    if (communicator->rank() == 1) request.dispatch.capacity = 10;
    expect_error(ErrorCode::mismatch, "all ranks give one, or none",
                 [&] { ht->dispatch(request.dispatch); });
  });
}

/// The handle of a dispatch that has not run yet may be used for a cached one on another lane.
TEST(Contract, AllRanksSendRowsOfOneKind) {
  const Workload workload = workload_for(2);
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    const int rank = communicator->rank();
    auto ll = LowLatency::create(communicator, {kShape});
    Request<LowLatency> cast(workload, rank, 1);
    cast.dispatch.cast_to_fp8 = rank == 1;
    expect_error(ErrorCode::mismatch, "all ranks send the same",
                 [&] { ll->dispatch(cast.dispatch); });
    auto ht = HighThroughput::create(communicator, {kShape});
    Request<HighThroughput> given(workload, rank, 1);
    const std::int64_t tokens = given.dispatch.x.size(0);
    const std::vector<float> scales(static_cast<std::size_t>(tokens), 1.0F);
    if (rank == 1) {
      given.dispatch.x = {given.dispatch.x.data(), DType::fp8_e4m3, {tokens, kShape.hidden}};
      given.dispatch.x_scales = {scales.data(), DType::fp32, {tokens, 1}};
    }
    expect_error(ErrorCode::mismatch, "all ranks send the same",
                 [&] { ht->dispatch(given.dispatch); });
  });
}

TEST(Contract, CachedDispatchWaitsForTheRoutingItTakes) {
  const Workload workload = workload_for(2);
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ht = HighThroughput::create(communicator, {kShape, 2});
    Stream slow, quick;
    slow.enqueue([] { std::this_thread::sleep_for(std::chrono::milliseconds(30)); });
    Request<HighThroughput> request(workload, communicator->rank(), 1);
    request.dispatch.capacity = 64;
    request.dispatch.stream = &slow;
    const auto first = ht->dispatch(request.dispatch);
    auto again = request.dispatch;
    again.topk_idx = {};
    again.capacity.reset();
    again.cached = first.handle;
    again.stream = &quick;
    const auto second = ht->dispatch(again);
    quick.synchronize();
    slow.synchronize();
    const auto rows = static_cast<std::size_t>(*first.needed_rows.as<std::int32_t>());
    EXPECT_EQ(*second.needed_rows.as<std::int32_t>(), static_cast<std::int32_t>(rows));
    EXPECT_EQ(
        std::memcmp(first.outputs.x.data(), second.outputs.x.data(), rows * kShape.row_bytes()), 0);
  });
}

/// A failure on a stream reaches a caller that waits for counts behind it.
TEST(Contract, AFailureOnAStreamDoesNotLeaveTheCallerWaiting) {
  const Workload workload = workload_for(2);
  CommunicatorOptions options = small_arena();
  options.timeout = std::chrono::milliseconds(200);
  std::atomic<bool> finished{false};
  with_thread_ranks(
      2,
      [&](const std::shared_ptr<Communicator>& communicator) {
        auto ht = HighThroughput::create(communicator, {kShape});
        if (communicator->rank() == 1) {
          const auto deadline = Deadline::after(std::chrono::seconds(10));
          while (!finished && !deadline.expired()) std::this_thread::yield();
          return;
        }
        Stream stream;
        Request<HighThroughput> request(workload, 0, 1);
        request.dispatch.stream = &stream;
        request.dispatch.capacity = 64;
        ht->dispatch(request.dispatch);  // will time out on the stream
        request.dispatch.capacity.reset();
        expect_error(ErrorCode::failed_earlier, "failed in an earlier call",
                     [&] { ht->dispatch(request.dispatch); });
        expect_error(ErrorCode::timeout, "waited 200 ms for rank 1", [&] { stream.synchronize(); });
        finished = true;
      },
      options);
}

// Failure --------------------------------------------------------------------------------------

TEST(Contract, ARankThatStaysAwayIsNamedAndTheObjectIsDead) {
  const Workload workload = workload_for(3);
  CommunicatorOptions options = small_arena();
  options.timeout = std::chrono::milliseconds(1000);
  std::atomic<int> named{0};
  with_thread_ranks(
      3,
      [&](const std::shared_ptr<Communicator>& communicator) {
        auto ll = LowLatency::create(communicator, {kShape});
        auto ht = HighThroughput::create(communicator, {kShape});
        if (communicator->rank() == 1) {
          const auto deadline = Deadline::after(std::chrono::seconds(10));
          while (named < 4 && !deadline.expired()) std::this_thread::yield();
          return;
        }
        auto expect_named = [&](auto& object, auto request) {
          try {
            object.dispatch(request);
            ADD_FAILURE();
          } catch (const Error& error) {
            EXPECT_EQ(error.code(), ErrorCode::timeout);
            EXPECT_EQ(error.peer(), 1) << error.what();
            EXPECT_EQ(error.rank(), communicator->rank());
            EXPECT_EQ(error.phase(), Phase::counts);
            ++named;
          }
          expect_error(ErrorCode::failed_earlier, "failed in an earlier call",
                       [&] { object.dispatch(request); });
          EXPECT_FALSE(object.status().failure.empty());
        };
        Request<LowLatency> request(workload, communicator->rank(), 0);
        expect_named(*ll, request.dispatch);
        Request<HighThroughput> other(workload, communicator->rank(), 0);
        expect_named(*ht, other.dispatch);
      },
      options);
  EXPECT_EQ(named, 4);
}

TEST(Contract, ARankThatLeavesIsFoundBeforeTheDeadline) {
  const Workload workload = workload_for(2);
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ll = LowLatency::create(communicator, {kShape});
    if (communicator->rank() == 1) return;
    Request<LowLatency> request(workload, 0, 1);
    expect_error(ErrorCode::peer_lost, "rank 1 left", [&] { ll->dispatch(request.dispatch); });
  });
}

// Shapes ---------------------------------------------------------------------------------------

TEST(Contract, FortyRanks) {
  const MoeShape shape{16, 40 * 3, 5, 6, DType::bf16};
  const Workload workload({shape, 40, 4, RoutingPattern::parse("uniform"), true});
  Reports reports;
  with_thread_ranks(40, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ll = LowLatency::create(communicator, {shape});
    auto ht = HighThroughput::create(communicator, {shape});
    for (int step = 0; step < 3; ++step) {
      reports.add(round_trip(*ll, *communicator, workload, step, {}));
      reports.add(round_trip(*ht, *communicator, workload, step, {}));
    }
  });
}

}  // namespace
}  // namespace expertwire::test
