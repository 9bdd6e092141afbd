#pragma once

#include "device/ptx.cuh"

namespace expertwire::ep::cuda {

/// Parts of a block of the low-latency kernels: workers, and behind them one warp that announces.
/// A release waits until everything before it has arrived at its peer, which takes as long as the
/// wire needs; the announcer waits for it, while the workers go on.
struct Block {
  static constexpr int kWorkers = 512;  // few, with many registers: loads in flight
  static constexpr int kThreads = kWorkers + 32;

  __device__ static bool announcer() { return threadIdx.x >= kWorkers; }
  /// Barriers of the workers alone.
  __device__ static void sync_workers() { device::barrier_sync<5>(kWorkers); }
  __device__ static bool all_workers(bool value) { return device::barrier_and<5>(kWorkers, value); }
  /// Workers call hand_over() when what is to be announced has been written; the announcer waits
  /// for them. In up to kMostRounds rounds, as many on both sides; before the first round comes
  /// again, the whole block meets at a barrier.
  static constexpr int kMostRounds = 8;
  __device__ static void hand_over(int round = 0) { device::barrier_arrive(6 + round, kThreads); }
  __device__ static void await_workers(int round = 0) { device::barrier_sync(6 + round, kThreads); }
};

/// Blocks of a grid that do something together: [first, first + count).
struct BlockRange {
  int first;
  int count;

  __device__ bool has_me() const { return index() >= 0 && index() < count; }
  __device__ int index() const { return static_cast<int>(blockIdx.x) - first; }
  __device__ static BlockRange all() { return {0, static_cast<int>(gridDim.x)}; }
};

/// All workers of a block, a half or a quarter of them, that handle a row by themselves: they meet
/// at a barrier of their own. The teams of several blocks are numbered so that consecutive ones are
/// on different SMs.
struct Team {
  static constexpr int kMostPerBlock = 4;

  int per_block;  ///< 1, 2 or 4
  int threads;
  int in_block;
  int thread;
  BlockRange blocks;

  __device__ Team(int teams, const BlockRange& in)
      : per_block(teams),
        threads(Block::kWorkers / teams),
        in_block(static_cast<int>(threadIdx.x) / threads),
        thread(static_cast<int>(threadIdx.x) % threads),
        blocks(in) {}
  /// Teams as large as they can be while each of `items` still has one at once.
  __device__ static Team for_items(int items, const BlockRange& in) {
    return {items <= in.count ? 1 : items <= 2 * in.count ? 2 : kMostPerBlock, in};
  }

  __device__ int index() const { return index_of(in_block); }
  __device__ int index_of(int team) const { return team * blocks.count + blocks.index(); }
  __device__ int count() const { return per_block * blocks.count; }
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
