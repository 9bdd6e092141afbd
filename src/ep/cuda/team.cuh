#pragma once

#include "device/ptx.cuh"

namespace expertwire::ep::cuda {

/// A whole block, a half or a quarter of it, that handles a row by itself: its threads meet at a
/// barrier of their own. The teams of a grid are numbered so that consecutive ones are on different
/// SMs.
struct Team {
  static constexpr int kMostPerBlock = 4;
  static constexpr int kBlockThreads = 512;  // few, with many registers: loads in flight

  int per_block;  ///< 1, 2 or 4
  int threads;
  int in_block;
  int thread;

  __device__ explicit Team(int teams)
      : per_block(teams),
        threads(kBlockThreads / teams),
        in_block(static_cast<int>(threadIdx.x) / threads),
        thread(static_cast<int>(threadIdx.x) % threads) {}
  /// Teams as large as they can be while each of `items`, over `blocks`, still has one at once.
  __device__ static Team for_items(int items, int blocks) {
    return Team(items <= blocks ? 1 : items <= 2 * blocks ? 2 : kMostPerBlock);
  }

  __device__ int index() const {
    return in_block * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
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
