#pragma once

#include "device/ptx.cuh"
#include "ep/lane.hpp"

namespace expertwire::ep::cuda {

/// How kernels read and write the words of a lane (see ep/lane.hpp). One thread of a block calls
/// it: before a release the block meets at a barrier, after an acquire likewise.
///
/// `kRemoved` takes a part of the protocol away, for tests.
template <Fault kRemoved = Fault::none>
struct DeviceAccess {
  __device__ static constexpr bool removed(Fault fault) { return fault == kRemoved; }

  __device__ static Epoch load(const Epoch* word) { return device::load_relaxed_system(word); }
  __device__ static void store(Epoch* word, Epoch value) {
    device::store_relaxed_system(word, value);
  }
  __device__ static Epoch acquire(const Epoch* word, Fault order) {
    return removed(order) ? device::load_relaxed_system(word) : device::load_acquire_system(word);
  }
  __device__ static void release(Epoch* word, Epoch value, Fault order) {
    if (removed(order))
      device::store_relaxed_system(word, value);
    else
      device::store_release_system(word, value);
  }
  __device__ static std::uint32_t count_up(std::uint32_t* word) {
    return device::count_up_gpu(word);
  }
};

/// The access of the library's kernels.
using KernelAccess = DeviceAccess<>;

}  // namespace expertwire::ep::cuda
