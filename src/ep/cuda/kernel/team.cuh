#pragma once

#include "device/ptx.cuh"

namespace expertwire::inline v0::ep::cuda {

/// Parts of a block of the low-latency kernels: workers, and behind them a few warps that send. A
/// release waits until everything before it has arrived at its peer, which takes as long as the
/// wire needs; senders wait for it, while the workers go on. Several, because what one has sent
/// first it can release only when all it has sent is there.
struct Block {
  static constexpr int kWorkers = 512;  // few, with many registers: loads in flight
  static constexpr int kSenders = 4;    // warps
  static constexpr int kThreads = kWorkers + 32 * kSenders;

  __device__ static bool sends() { return threadIdx.x >= kWorkers; }
  /// The number of this sender's warp.
  __device__ static int sender() { return (static_cast<int>(threadIdx.x) - kWorkers) / 32; }
  /// Barriers of the workers alone.
  __device__ static void sync_workers() { device::barrier_sync<5>(kWorkers); }
  __device__ static bool all_workers(bool value) { return device::barrier_and<5>(kWorkers, value); }
  /// Workers call hand_over() when what is to be sent or released has been written; senders wait
  /// for them. As often as each other, with a barrier of the whole block between two times.
  __device__ static void hand_over() { device::barrier_arrive<6>(kThreads); }
  __device__ static void await_workers() { device::barrier_sync<6>(kThreads); }
  /// All threads meet, once, when workers have read all that came. Says whether it did come to all.
  __device__ static bool meet_having_read(bool good) { return __syncthreads_and(good); }
};

/// All workers of a block, a half or a quarter of them, that handle a row by themselves: they meet
/// at a barrier of their own. The teams of a grid are numbered so that consecutive ones are on
/// different SMs, from the last block on: tokens are numbered from the first, so where there is
/// little of both, no SM has to do with both.
struct Team {
  static constexpr int kMostPerBlock = 4;
  static constexpr int kLogWorkers = 9;
  static_assert(1 << kLogWorkers == Block::kWorkers);

  int blocks;     ///< that have such teams
  int per_block;  ///< 1, 2 or 4
  int threads;
  int in_block;
  int thread;

  /// 2^log of them a block.
  __device__ Team(int log, int blocks)
      : blocks(blocks),
        per_block(1 << log),
        threads(Block::kWorkers >> log),
        in_block(static_cast<int>(threadIdx.x) >> (kLogWorkers - log)),
        thread(static_cast<int>(threadIdx.x) & (threads - 1)) {}
  /// Teams as large as they can be while each of `items`, over `blocks`, still has one at once.
  __device__ static Team for_items(int items, int blocks) {
    static_assert(kMostPerBlock == 4);
    return {items <= blocks ? 0 : items <= 2 * blocks ? 1 : 2, blocks};
  }

  __device__ int index() const { return index_of(in_block); }
  __device__ int index_of(int team) const {
    return (team + 1) * blocks - 1 - static_cast<int>(blockIdx.x);
  }
  __device__ int count() const { return per_block * blocks; }
  /// Barriers have constant ids, so that racecheck can follow them.
  __device__ void sync() const {
    static_assert(kMostPerBlock == 4);
    switch (in_block) {
      case 0:
        return device::barrier_sync<1>(threads);
      case 1:
        return device::barrier_sync<2>(threads);
      case 2:
        return device::barrier_sync<3>(threads);
      default:
        return device::barrier_sync<4>(threads);
    }
  }
  __device__ bool first_warp() const { return thread < 32; }
};

}  // namespace expertwire::ep::cuda
