// What both modes promise of streams, lanes, ends and failures.

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "ranks/requests.hpp"
#include "ranks/test_stream.hpp"

namespace expertwire::test {
namespace {

using reference::Workload;

bool same_bytes(reference::Tensors& tensors, const TensorView& a, const TensorView& b,
                std::size_t bytes) {
  return std::memcmp(tensors.download(a).data(), tensors.download(b).data(), bytes) == 0;
}

// Streams and lanes ----------------------------------------------------------------------------

/// Results on a stream equal those of plain calls, in three orders over two streams and two lanes.
TEST(Contract, TwoLanesOnTwoStreamsInEveryOrder) {
  const int ranks = 3;
  const Workload workload = workload_for(ranks);
  with_thread_ranks(ranks, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ll = LowLatency::create(communicator, {kShape, 2});
    auto plain = LowLatency::create(communicator, {kShape});
    TestStream streams[2] = {TestStream(*communicator), TestStream(*communicator)};
    // D: dispatch, C: combine; the digit is the micro-batch, which has its own stream.
    for (const char* order : {"D0D1C0C1", "D0D1C1C0", "D0C0D1C1"}) {
      std::vector<Request<LowLatency>> requests;
      requests.emplace_back(*communicator, workload, 5);
      requests.emplace_back(*communicator, workload, 6);
      std::vector<LowLatency::DispatchResult> dispatched(2);
      std::vector<LowLatency::CombineResult> combined(2);
      for (const char* step = order; *step != '\0'; step += 2) {
        const auto batch = static_cast<std::size_t>(step[1] - '0');
        auto& request = requests[batch];
        request.dispatch.stream = streams[batch].get();
        if (step[0] == 'D') {
          dispatched[batch] = ll->dispatch(request.dispatch);
        } else {
          LowLatency::CombineRequest combine;
          combine.y = dispatched[batch].outputs.x;
          combine.handle = dispatched[batch].handle;
          combine.stream = streams[batch].get();
          combined[batch] = ll->combine(combine);
        }
      }
      for (TestStream& stream : streams) stream.synchronize();
      for (std::size_t batch : {0U, 1U}) {
        auto& request = requests[batch].dispatch;
        reference::Tensors& tensors = requests[batch].tensors;
        request.stream = {};
        const auto again = plain->dispatch(request);
        LowLatency::CombineRequest combine;
        combine.y = again.outputs.x;
        combine.handle = again.handle;
        const auto want = plain->combine(combine);
        ASSERT_EQ(want.out.bytes(), combined[batch].out.bytes());
        EXPECT_TRUE(same_bytes(tensors, want.out, combined[batch].out, want.out.bytes()));
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
    HighThroughputOptions options{kShape, 2};
    options.sms = kOnCuda ? 8 : 0;  // both lanes fit side by side, else they go in call order
    auto ht = HighThroughput::create(communicator, options);
    TestStream first_stream(*communicator), second_stream(*communicator);
    Request<HighThroughput> first(*communicator, workload, 2), second(*communicator, workload, 3);
    first.dispatch.capacity = second.dispatch.capacity = 64;
    first.dispatch.stream = first_stream.get();
    second.dispatch.stream = second_stream.get();
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
    const auto came = [&](const TensorView& rows) {
      return *first.tensors.download(rows).as<std::int32_t>();
    };
    EXPECT_EQ(came(a.needed_rows), needed(2));
    EXPECT_EQ(came(b.needed_rows), needed(3));
  });
}

// Letting go ------------------------------------------------------------------------------------

/// Objects and results may go while their work is still queued: it runs, into memory that is there.
TEST(Contract, ObjectsWaitForTheirQueuedWork) {
  const Workload workload = workload_for(2);
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    TestStream stream(*communicator);
    Request<HighThroughput> request(*communicator, workload, 1);
    Request<LowLatency> other(*communicator, workload, 1);
    stream.enqueue([] { std::this_thread::sleep_for(std::chrono::milliseconds(30)); });
    {
      auto ht = HighThroughput::create(communicator, {kShape});
      auto ll = LowLatency::create(communicator, {kShape});
      request.dispatch.capacity = 64;
      request.dispatch.stream = stream.get();
      other.dispatch.stream = stream.get();
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
    Request<HighThroughput> request(*communicator, workload, 1);
    if (communicator->rank() == 1) request.dispatch.capacity = 10;
    expect_error(ErrorCode::mismatch, "all ranks give one, or none",
                 [&] { ht->dispatch(request.dispatch); });
  });
}

TEST(Contract, AllRanksSendRowsOfOneKind) {
  const Workload workload = workload_for(2);
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    const int rank = communicator->rank();
    auto ll = LowLatency::create(communicator, {kShape});
    Request<LowLatency> cast(*communicator, workload, 1);
    cast.dispatch.cast_to_fp8 = rank == 1;
    expect_error(ErrorCode::mismatch, "all ranks send the same",
                 [&] { ll->dispatch(cast.dispatch); });
    auto ht = HighThroughput::create(communicator, {kShape});
    Request<HighThroughput> given(*communicator, workload, 1);
    const std::int64_t tokens = given.dispatch.x.size(0);
    const std::vector<float> scales(static_cast<std::size_t>(tokens), 1.0F);
    const ConstTensorView ones = given.tensors.upload({scales.data(), DType::fp32, {tokens, 1}});
    if (rank == 1) {
      given.dispatch.x = {given.dispatch.x.data(), DType::fp8_e4m3, {tokens, kShape.hidden}};
      given.dispatch.x_scales = ones;
    }
    expect_error(ErrorCode::mismatch, "all ranks send the same",
                 [&] { ht->dispatch(given.dispatch); });
  });
}

/// The handle of a dispatch that has not run yet may be used for a cached one on another lane.
TEST(Contract, CachedDispatchWaitsForTheRoutingItTakes) {
  const Workload workload = workload_for(2);
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ht = HighThroughput::create(communicator, {kShape, 2});
    TestStream slow(*communicator), quick(*communicator);
    slow.enqueue([] { std::this_thread::sleep_for(std::chrono::milliseconds(30)); });
    Request<HighThroughput> request(*communicator, workload, 1);
    request.dispatch.capacity = 64;
    request.dispatch.stream = slow.get();
    const auto first = ht->dispatch(request.dispatch);
    auto again = request.dispatch;
    again.topk_idx = {};
    again.capacity.reset();
    again.cached = first.handle;
    again.stream = quick.get();
    const auto second = ht->dispatch(again);
    quick.synchronize();
    slow.synchronize();
    const auto came = [&](const TensorView& rows) {
      return *request.tensors.download(rows).as<std::int32_t>();
    };
    const std::int32_t rows = came(first.needed_rows);
    EXPECT_EQ(came(second.needed_rows), rows);
    EXPECT_TRUE(same_bytes(request.tensors, first.outputs.x, second.outputs.x,
                           static_cast<std::size_t>(rows) * kShape.row_bytes()));
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
        TestStream stream(*communicator);
        Request<HighThroughput> request(*communicator, workload, 1);
        request.dispatch.stream = stream.get();
        request.dispatch.capacity = 64;
        ht->dispatch(request.dispatch);  // will time out on the stream
        request.dispatch.capacity.reset();
        // Work on a CUDA stream has no other place where its error could come up.
        const auto again = [&] { ht->dispatch(request.dispatch); };
        if (kOnCuda) {
          expect_error(ErrorCode::timeout, "waited 200 ms for rank 1", again);
        } else {
          expect_error(ErrorCode::failed_earlier, "failed in an earlier call", again);
          expect_error(ErrorCode::timeout, "waited 200 ms for rank 1",
                       [&] { stream.synchronize(); });
        }
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
          EXPECT_FALSE(said(object.status()).empty());
        };
        Request<LowLatency> request(*communicator, workload, 0);
        expect_named(*ll, request.dispatch);
        Request<HighThroughput> other(*communicator, workload, 0);
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
    Request<LowLatency> request(*communicator, workload, 1);
    expect_error(ErrorCode::peer_lost, "rank 1 left", [&] { ll->dispatch(request.dispatch); });
  });
}

}  // namespace
}  // namespace expertwire::test
