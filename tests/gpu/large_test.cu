// The largest sizes, and rows past 2^31 bytes.

#include "gpu/buffers.hpp"
#include "ranks/thread_ranks.hpp"

namespace expertwire::test {
namespace {

template <class Object, class Options>
void check(const MoeShape& shape, int ranks, const Options& options, const char* routing,
           const reference::RoundTripOptions& how) {
  const reference::Workload workload(
      {shape, ranks, 21, reference::RoutingPattern::parse(routing), false});
  CommunicatorOptions memory = small_arena();
  memory.arena_bytes = Object::memory_bytes(options, ranks) + (std::size_t{16} << 20);
  memory.timeout = std::chrono::milliseconds(60000);
  Reports reports;
  with_thread_ranks(
      ranks,
      [&](const std::shared_ptr<Communicator>& communicator) {
        auto object = Object::create(communicator, options);
        reports.add(round_trip(*object, *communicator, workload, 0, how));
      },
      memory);
}

TEST(Large, SixteenThousandTokens) {
  const MoeShape shape{256, 64, 8, 16384, DType::bf16};
  reference::RoundTripOptions how;
  how.weights_home = true;
  HighThroughputOptions options{shape};
  options.shape.max_tokens = 0;
  check<HighThroughput>(shape, 4, options, "zipf:0.8", how);
}

TEST(Large, AThousandTokensAtLowLatency) {
  const MoeShape shape{512, 64, 8, 1024, DType::bf16};
  check<LowLatency>(shape, 4, LowLatencyOptions{shape}, "lognormal:1.0", {});
}

// Two ranks send all their rows to the first: 2.4 GB of its pool. Filled and checked by kernels.

__device__ float value(int source, std::int64_t token, int h) {
  const std::uint32_t mixed = static_cast<std::uint32_t>(token * 2654435761U) ^
                              static_cast<std::uint32_t>(h * 40503 + source * 97);
  return static_cast<float>(mixed >> 9);
}

__global__ void fill(float* rows, int source, int hidden) {
  float* row = rows + static_cast<std::int64_t>(blockIdx.x) * hidden;
  for (int h = threadIdx.x; h < hidden; h += blockDim.x) row[h] = value(source, blockIdx.x, h);
}

/// Counts values that differ; rows of `tokens` a source, one source behind the other.
__global__ void compare(const float* rows, int source, int tokens, int hidden,
                        unsigned long long* wrong) {
  const int from = source >= 0 ? source : static_cast<int>(blockIdx.x) / tokens;
  const float* row = rows + static_cast<std::int64_t>(blockIdx.x) * hidden;
  for (int h = threadIdx.x; h < hidden; h += blockDim.x)
    if (row[h] != value(from, blockIdx.x % tokens, h)) atomicAdd(wrong, 1ULL);
}

TEST(Large, PoolPastTwoToTheThirtyOne) {
  constexpr int kTokens = 4608, kHidden = 65536;
  const MoeShape shape{kHidden, 2, 1, kTokens, DType::fp32};
  HighThroughputOptions options{shape};
  options.pool_rows = HighThroughputOptions::kEveryRow;
  CommunicatorOptions memory = small_arena();
  memory.arena_bytes = HighThroughput::memory_bytes(options, 2) + (std::size_t{16} << 20);
  with_thread_ranks(
      2,
      [&](const std::shared_ptr<Communicator>& communicator) {
        const int rank = communicator->rank();
        Buffers buffers(communicator->cuda_device());
        auto object = HighThroughput::create(communicator, options);
        const TensorView x = buffers.make(shape.dtype, {kTokens, kHidden});
        const TensorView out = buffers.make(shape.dtype, {kTokens, kHidden});
        const TensorView ids = buffers.make(DType::int32, {kTokens, 1});
        const TensorView wrong = buffers.make(DType::int64, {1});
        fill<<<kTokens, 512, 0, buffers.stream()>>>(x.as<float>(), rank, kHidden);
        check_cuda(cudaMemsetAsync(ids.data(), 0, ids.bytes(), buffers.stream()), "memset");
        check_cuda(cudaMemsetAsync(wrong.data(), 0, 8, buffers.stream()), "memset");
        buffers.poison(out);
        buffers.synchronize();
        HighThroughput::DispatchRequest dispatch;
        dispatch.x = x;
        dispatch.topk_idx = ids;
        dispatch.output = HighThroughput::Output::pool;
        const auto came = object->dispatch(dispatch);
        const std::int64_t rows = came.outputs.x.size(0);
        EXPECT_EQ(rows, rank == 0 ? 2 * kTokens : 0);
        if (rows > 0)
          compare<<<static_cast<unsigned>(rows), 512, 0, buffers.stream()>>>(
              came.outputs.x.as<float>(), -1, kTokens, kHidden, wrong.as<unsigned long long>());
        buffers.synchronize();
        HighThroughput::CombineRequest combine;
        combine.y = came.outputs.x;
        combine.handle = came.handle;
        combine.out = out;
        object->combine(combine);
        compare<<<kTokens, 512, 0, buffers.stream()>>>(out.as<float>(), rank, kTokens, kHidden,
                                                       wrong.as<unsigned long long>());
        EXPECT_EQ(*reinterpret_cast<unsigned long long*>(buffers.download(wrong).data()), 0U);
        communicator->barrier();
      },
      memory);
}

}  // namespace
}  // namespace expertwire::test
