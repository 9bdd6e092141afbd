// What both modes promise besides right values: errors, handles, lanes, streams, shapes.

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>

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
        Request<LowLatency> bad(*communicator, workload, step);
        bad.dispatch.topk_idx = {};
        expect_error(ErrorCode::invalid_argument, "topk_idx is absent",
                     [&] { ll->dispatch(bad.dispatch); });
        Request<LowLatency> none(*communicator, workload, step);
        none.dispatch.sms = -1;
        expect_error(ErrorCode::invalid_argument, "sms is -1",
                     [&] { ll->dispatch(none.dispatch); });
        Request<HighThroughput> worse(*communicator, workload, step);
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
    Request<LowLatency> request(*communicator, workload, 0);
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
    for (int step = 0; step < 5; ++step) requests.emplace_back(*communicator, workload, step);
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
        const TensorView home = requests[step].tensors.download(out.out);
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
          const auto y = reference::decode(kShape.dtype, home.as<std::byte>() + row, 64);
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
      // Owned output needs no pool.
      if (most <= 40 || step % 2 == 1) {
        reports.add(round_trip(*ht, *communicator, workload, step, {}));
        continue;
      }
      Request<HighThroughput> request(*communicator, workload, step);
      request.dispatch.output = HighThroughput::Output::pool;
      expect_error(ErrorCode::capacity, "40 rows", [&] { ht->dispatch(request.dispatch); });
      ++refused;
    }
  });
  EXPECT_GT(refused, 0);
}

TEST(Contract, PoolRowsThatAreHeldAreNotOverwritten) {
  const Workload workload = workload_for(2);
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ht = HighThroughput::create(communicator, with_pool(kShape));
    auto pool_dispatch = [&](int step) {
      Request<HighThroughput> request(*communicator, workload, step);
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
    auto ht = HighThroughput::create(communicator, with_pool(kShape));
    Request<HighThroughput> request(*communicator, workload, 1);
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
    reference::Tensors tensors(*communicator);
    const std::vector<std::byte> x(kShape.row_bytes(), std::byte{1});
    const std::vector<std::int32_t> ids = {0, 24, -7, -1};
    LowLatency::DispatchRequest request;
    request.x = tensors.upload({x.data(), DType::bf16, {1, 64}});
    request.topk_idx = tensors.upload({ids.data(), DType::int32, {1, 4}});
    const auto result = ll->dispatch(request);
    const TensorView counts = tensors.download(result.outputs.tokens_per_expert);
    std::int32_t rows = 0;
    for (int e = 0; e < 12; ++e) rows += counts.as<std::int32_t>()[e];
    EXPECT_EQ(rows, communicator->rank() == 0 ? 2 : 0);
    EXPECT_EQ(ll->status().invalid_expert_ids, 2);
    // On a GPU, whichever a thread comes to first.
    const std::string first = ll->status().first_invalid_id;
    EXPECT_TRUE(first == "topk_idx[0, 1] = 24" || (kOnCuda && first == "topk_idx[0, 2] = -7"))
        << first;
    EXPECT_TRUE(said(ll->status()).empty());
  });
}

TEST(Contract, AllocatorThatThrowsEndsTheCallAndNothingElse) {
  const Workload workload = workload_for(2);
  Reports reports;
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ht = HighThroughput::create(communicator, {kShape});
    Request<HighThroughput> request(*communicator, workload, 0);
    const Allocator memory = request.tensors.allocator();
    const auto refuses = [&](const AllocationRequest& asked) {
      if (asked.name == "x") throw std::runtime_error("no memory today");
      return memory(asked);
    };
    if (communicator->rank() == 1) request.dispatch.allocator = Allocator::of(refuses);
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
