// What a high-throughput dispatch tells of its counts, its timeout and its outputs, however it is
// called.

#include <gtest/gtest.h>

#include <thread>

#include "ranks/requests.hpp"
#include "ranks/test_stream.hpp"

namespace expertwire::test {
namespace {

using reference::RoutingPattern;
using reference::Workload;

struct Counts {
  std::vector<std::int32_t> sources, experts;
};

Counts counts_of(const Workload& workload, int rank, int step) {
  const reference::Oracle oracle(workload, step);
  Counts counts;
  counts.sources.resize(static_cast<std::size_t>(workload.spec().ranks));
  counts.experts.resize(static_cast<std::size_t>(kShape.experts / workload.spec().ranks));
  for (const auto& row : oracle.token_major(rank)) {
    ++counts.sources[static_cast<std::size_t>(row.source)];
    for (std::int32_t expert : row.experts)
      if (expert >= 0) ++counts.experts[static_cast<std::size_t>(expert)];
  }
  return counts;
}

void expect_counts(const HighThroughput::DispatchResult& result, const Counts& want) {
  EXPECT_EQ(result.rows_per_source, want.sources);
  EXPECT_EQ(result.rows_per_expert, want.experts);
}

TEST(Counts, OfEveryKindOfDispatch) {
  const Workload workload = workload_for(3);
  with_thread_ranks(3, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ht = HighThroughput::create(communicator, {kShape});
    TestStream stream(*communicator);
    for (int step = 0; step < 4; ++step) {
      const Counts want = counts_of(workload, communicator->rank(), step);
      Request<HighThroughput> request(*communicator, workload, step);
      expect_counts(ht->dispatch(request.dispatch), want);  // eager
      request.dispatch.stream = stream.get();
      const auto eager = ht->dispatch(request.dispatch);  // eager on a stream
      expect_counts(eager, want);
      auto cached = request.dispatch;
      cached.topk_idx = {};
      cached.cached = eager.handle;
      expect_counts(ht->dispatch(cached), want);  // cached, of a handle that has them, on a stream
      cached.stream = {};
      expect_counts(ht->dispatch(cached), want);  // and without
      request.dispatch.stream = {};
      request.dispatch.capacity = 60;
      expect_counts(ht->dispatch(request.dispatch), want);  // with a capacity, finished
      stream.synchronize();
    }
  });
}

TEST(Counts, NeededRowsPassACapacity) {
  const Workload workload = workload_for(3);
  with_thread_ranks(3, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ht = HighThroughput::create(communicator, {kShape});
    for (int step = 0; step < 4; ++step) {
      const auto rows = reference::Oracle(workload, step).token_major(communicator->rank()).size();
      Request<HighThroughput> request(*communicator, workload, step);
      for (std::int64_t capacity : {0, 5, 96}) {
        request.dispatch.capacity = capacity;
        const auto result = ht->dispatch(request.dispatch);
        EXPECT_EQ(*request.tensors.download(result.needed_rows).as<std::int32_t>(),
                  static_cast<std::int32_t>(rows));
        EXPECT_EQ(result.outputs.x.size(0), capacity);
      }
    }
  });
}

/// A call's own deadline, not the communicator's, in both modes.
TEST(Counts, ACallKeepsItsOwnTimeout) {
  const Workload workload = workload_for(2);
  std::atomic<bool> finished{false};
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ll = LowLatency::create(communicator, {kShape});
    auto ht = HighThroughput::create(communicator, {kShape});
    if (communicator->rank() == 1) {
      const auto deadline = Deadline::after(std::chrono::seconds(15));
      while (!finished && !deadline.expired()) std::this_thread::yield();
      return;
    }
    Request<LowLatency> low(*communicator, workload, 1);
    low.dispatch.timeout = std::chrono::milliseconds(170);
    expect_error(ErrorCode::timeout, "waited 170 ms for rank 1",
                 [&] { ll->dispatch(low.dispatch); });
    Request<HighThroughput> high(*communicator, workload, 1);
    high.dispatch.timeout = std::chrono::milliseconds(170);
    expect_error(ErrorCode::timeout, "waited 170 ms for rank 1",
                 [&] { ht->dispatch(high.dispatch); });
    finished = true;
  });
}

TEST(Counts, OutputsAreAlignedAndMisalignedOnesAreRefused) {
  const Workload workload({kShape, 2, 21, RoutingPattern::parse("uniform")});
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ll = LowLatency::create(communicator, {kShape});
    auto ht = HighThroughput::create(communicator, {kShape});
    Request<LowLatency> low(*communicator, workload, 1);
    Request<HighThroughput> high(*communicator, workload, 1);
    const auto a = ll->dispatch(low.dispatch);
    const auto b = ht->dispatch(high.dispatch);
    for (const TensorView& tensor :
         {a.outputs.x, a.outputs.tokens_per_expert, a.outputs.ranges, a.outputs.source_tokens,
          b.outputs.x, b.outputs.source_tokens, b.outputs.topk_experts, b.outputs.topk_weights})
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(tensor.data()) % 16, 0U);
    const auto moved = [](const TensorView& tensor, std::ptrdiff_t bytes) {
      return static_cast<std::byte*>(tensor.data()) + bytes;
    };
    auto bad = low.dispatch;
    bad.outputs = a.outputs;
    bad.outputs.x = {moved(a.outputs.x, 8),
                     DType::bf16,
                     {a.outputs.x.size(0), a.outputs.x.size(1), kShape.hidden}};
    expect_error(ErrorCode::invalid_argument, "aligned to 16", [&] { ll->dispatch(bad); });
    bad.outputs = a.outputs;
    bad.outputs.ranges = {moved(a.outputs.ranges, 2), DType::int32, {12, 2, 2}};
    expect_error(ErrorCode::invalid_argument, "aligned to 4", [&] { ll->dispatch(bad); });
    HighThroughput::CombineRequest combine;
    combine.y = {moved(b.outputs.x, 2), DType::bf16, {b.outputs.x.size(0), kShape.hidden}};
    combine.handle = b.handle;
    expect_error(ErrorCode::invalid_argument, "aligned to 16", [&] { ht->combine(combine); });
  });
}

}  // namespace
}  // namespace expertwire::test
