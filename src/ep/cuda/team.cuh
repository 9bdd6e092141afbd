#pragma once

#include "device/ptx.cuh"

namespace expertwire::ep::cuda {

/// A quarter of a block that handles a row by itself: its threads meet at a barrier of their own.
/// The teams of a grid are numbered so that consecutive ones are on different SMs.
struct Team {
  static constexpr int kThreads = 256;
  static constexpr int kPerBlock = 4;
  static constexpr int kBlockThreads = kThreads * kPerBlock;

  int in_block = static_cast<int>(threadIdx.x) / kThreads;
  int thread = static_cast<int>(threadIdx.x) % kThreads;

  __device__ int index() const {
    return in_block * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
  }
  __device__ static int count() { return kPerBlock * static_cast<int>(gridDim.x); }
  /// Barriers have constant ids, so that racecheck can follow them.
  __device__ void sync() const {
    static_assert(kPerBlock == 4);
    switch (in_block) {
      case 0:
        return device::barrier_sync<1, kThreads>();
      case 1:
        return device::barrier_sync<2, kThreads>();
      case 2:
        return device::barrier_sync<3, kThreads>();
      default:
        return device::barrier_sync<4, kThreads>();
    }
  }
  __device__ bool first_warp() const { return thread < 32; }
};

}  // namespace expertwire::ep::cuda
