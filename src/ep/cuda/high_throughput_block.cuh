#pragma once

// What dispatch and combine of the high-throughput mode share: a block's shared memory, and how the
// rows of a chunk are counted.

#include "ep/cuda/high_throughput_kernels.hpp"
#include "ep/cuda/kernel.cuh"
#include "ep/cuda/pipeline.cuh"

namespace expertwire::ep::cuda {

inline constexpr int kChunk = static_cast<int>(HighThroughputSlots::kChunkRows);

/// The counts of a handle that every row needs, and rings behind them.
struct BlockShared {
  std::uint64_t full[kHighThroughputWarps][kMostStages];
  std::int32_t held[kHighThroughputWarps][kMostStages];  // rows in a stage
  std::int32_t first_at[kMostRanks], capacity[kMostRanks];
  bool overflow;
};

inline constexpr std::size_t kBlockSharedBytes = (sizeof(BlockShared) + 127) / 128 * 128;
static_assert(kBlockSharedBytes + kRingBytes + 1024 <= 227 * 1024,
              "shared memory of a Hopper block");

inline std::size_t shared_bytes(const Moving& moving) {
  return kBlockSharedBytes + (moving.bulk ? kRingBytes : 0);
}

__device__ __forceinline__ void take_routing(const Context& c, const HighThroughputRouting& routing,
                                             BlockShared& s) {
  for (int rank = threadIdx.x; rank < c.size; rank += blockDim.x) {
    s.first_at[rank] = routing.first_at[rank];
    s.capacity[rank] = routing.capacity[rank];
  }
  if (threadIdx.x == 0) s.overflow = *routing.overflow != 0;
  __syncthreads();
}

/// The ring of `warp` of the `moving.warps` that have one; `parts` pieces a stage.
__device__ __forceinline__ Ring ring_of(BlockShared& s, const Moving& moving, int warp, int parts) {
  Ring ring;
  ring.stages = moving.stages;
  ring.stage_bytes = moving.piece_bytes * static_cast<std::uint32_t>(parts);
  ring.full = s.full[warp];
  ring.memory =
      reinterpret_cast<std::byte*>(&s) + kBlockSharedBytes +
      static_cast<std::size_t>(warp) * (kRingBytes / static_cast<std::uint32_t>(moving.warps));
  if (has_bulk_copies() && moving.bulk) {
    if (threadIdx.x % 32 == 0) ring.init();
    __syncwarp();
  }
  return ring;
}

__device__ __forceinline__ int pieces_of(std::uint64_t row_bytes, const Moving& moving) {
  return static_cast<int>((row_bytes + moving.piece_bytes - 1) / moving.piece_bytes);
}

/// Counts one more piece of row `row` of a pair, and announces the row's chunk when its last piece
/// is there. What other warps counted before is covered by the release: the count is acq_rel.
__device__ __forceinline__ void count_piece(std::uint32_t* counter, Epoch* flag, int row, int rows,
                                            int pieces, Epoch n) {
  const int first = row / kChunk * kChunk;
  const auto whole = static_cast<std::uint32_t>(min(kChunk, rows - first) * pieces);
  if (KernelAccess::count_up(counter) + 1 != whole) return;
  KernelAccess::store(counter, 0);
  publish<KernelAccess>(flag, n);
}

}  // namespace expertwire::ep::cuda
