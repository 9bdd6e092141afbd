// What objects take and give back: room in the arena, descriptors, threads.

#include <gtest/gtest.h>

#include <thread>

#include "ranks/entries.hpp"
#include "ranks/requests.hpp"

namespace expertwire::test {
namespace {

using reference::Workload;

/// What a slow rank still writes for an object does not land in the next one's memory.
TEST(Resources, MemoryIsNotUsedAgainWhileAPeerStillHasTheObject) {
  const Workload workload = workload_for(2);
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    auto pool_dispatch = [&](HighThroughput& object) {
      Request<HighThroughput> request(*communicator, workload, 1);
      request.dispatch.output = HighThroughput::Output::pool;
      return object.dispatch(request.dispatch);
    };
    auto first = HighThroughput::create(communicator, with_pool(kShape));
    const auto held = pool_dispatch(*first);
    std::unique_ptr<HighThroughput> second;
    const std::size_t before = communicator->arena().carved();
    if (communicator->rank() == 0) {
      first->release(held.handle);
      first.reset();
      EXPECT_EQ(communicator->arena().carved(), before);  // rank 1 still has it
      second = HighThroughput::create(communicator, with_pool(kShape));
    } else {
      second = HighThroughput::create(communicator, with_pool(kShape));
      first->release(held.handle);  // writes a credit into what rank 0 let go of
      first.reset();
    }
    communicator->barrier();
    EXPECT_EQ(communicator->arena().carved(), before);
  });
}

TEST(Resources, ANewObjectWaitsForTheRoomOfOneThatAPeerStillDestroys) {
  const MoeShape shape{512, 8, 2, 1024, DType::bf16};  // much more than device memory is cut into
  CommunicatorOptions memory = small_arena();
  memory.arena_bytes =
      HighThroughput::memory_bytes(with_pool(shape), 2) * 3 / 2;  // for one at a time
  with_thread_ranks(
      2,
      [&](const std::shared_ptr<Communicator>& communicator) {
        for (int i = 0; i < 3; ++i) {
          auto object = HighThroughput::create(communicator, with_pool(shape));
          communicator->barrier();
          if (communicator->rank() == i % 2)
            std::this_thread::sleep_for(std::chrono::milliseconds(100));
        }
      },
      memory);
}

TEST(Resources, RoomThatAPeerKeepsIsAnErrorOnEveryRankAndTheJobGoesOn) {
  const MoeShape shape{512, 8, 2, 1024, DType::bf16};  // much more than device memory is cut into
  CommunicatorOptions memory = small_arena();
  memory.arena_bytes =
      HighThroughput::memory_bytes(with_pool(shape), 2) * 3 / 2;  // for one at a time
  memory.timeout = std::chrono::milliseconds(2000);
  with_thread_ranks(
      2,
      [&](const std::shared_ptr<Communicator>& communicator) {
        auto object = HighThroughput::create(communicator, with_pool(shape));
        if (communicator->rank() == 1) object.reset();
        expect_error(ErrorCode::capacity, "arena",
                     [&] { HighThroughput::create(communicator, with_pool(shape)); });
        object.reset();
        communicator->barrier();
        HighThroughput::create(communicator, with_pool(shape));
      },
      memory);
}

TEST(Resources, ARankWithoutRoomIsAnErrorOnEveryRank) {
  run_in_process(3, [&](std::shared_ptr<Bootstrap> bootstrap) {
    CommunicatorOptions options = small_arena();
    if (kOnCuda) options.cuda_device = cuda_device_of(bootstrap->rank());
    if (bootstrap->rank() == 1) options.arena_bytes = 4096 * 4;
    auto communicator = Communicator::create(std::move(bootstrap), options);
    expect_error(ErrorCode::capacity,
                 communicator->rank() == 1 ? "EXPERTWIRE_ARENA_BYTES" : "rank 1", [&] {
                   LowLatency::create(communicator, {{1024, 24, 4, 512, DType::bf16}});
                 });
    communicator->barrier();
    EXPECT_EQ(communicator->arena().carved(), 0U);
  });
}

TEST(Resources, AThousandObjectsLeaveNothingBehind) {
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    communicator->barrier();
    const auto before = entries_of("task");
    communicator->barrier();
    for (int i = 0; i < (kOnCuda ? 100 : 500); ++i) {
      LowLatency::create(communicator, {kShape, 2, 2});
      HighThroughput::create(communicator, {kShape, 2, 0, 2});
    }
    communicator->barrier();
    EXPECT_EQ(communicator->arena().carved(), 0U);
    EXPECT_LE(entries_of("task"), before);
    communicator->barrier();
  });
}

}  // namespace
}  // namespace expertwire::test
