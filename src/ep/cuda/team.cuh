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
  /// for them. As often as each other, with a barrier of the whole block between two times.
  __device__ static void hand_over() { device::barrier_arrive<6>(kThreads); }
  __device__ static void await_workers() { device::barrier_sync<6>(kThreads); }
};

/// All workers of a block, a half or a quarter of them, that handle a row by themselves: they meet
/// at a barrier of their own. The teams of a grid are numbered so that consecutive ones are on
/// different SMs.
struct Team {
  static constexpr int kMostPerBlock = 4;

  int per_block;  ///< 1, 2 or 4
  int threads;
  int in_block;
  int thread;

  __device__ explicit Team(int teams)
      : per_block(teams),
        threads(Block::kWorkers / teams),
        in_block(static_cast<int>(threadIdx.x) / threads),
        thread(static_cast<int>(threadIdx.x) % threads) {}
  /// Teams as large as they can be while each of `items`, over `blocks`, still has one at once.
  __device__ static Team for_items(int items, int blocks) {
    return Team(items <= blocks ? 1 : items <= 2 * blocks ? 2 : kMostPerBlock);
  }

  __device__ int index() const { return index_of(in_block); }
  __device__ static int index_of(int team) {
    return team * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
  }
  __device__ int count() const { return per_block * static_cast<int>(gridDim.x); }
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
