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
  __device__ void sync() const { device::barrier_sync(1 + in_block, kThreads); }
  __device__ bool first_warp() const { return thread < 32; }

  /// True on all threads if thread 0 found `good`; `slot` is a word of the team in shared memory.
  __device__ bool agree(bool good, bool* slot) const {
    if (thread == 0) *slot = good;
    sync();
    const bool result = *slot;
    sync();
    return result;
  }
};

}  // namespace expertwire::ep::cuda
