#pragma once

#include "device/ptx.cuh"
#include "ep/protocol/lane.hpp"

namespace expertwire::inline v0::ep::cuda {

/// Nothing is removed or delayed.
struct NoFaults {
  __device__ static constexpr bool removed(Fault) { return false; }
  __device__ static void delay() {}
};

/// How kernels read and write the words of a lane (see ep/protocol/lane.hpp). Between what other
/// threads of the block wrote and a release, and between an acquire and what others read, is a
/// barrier.
///
/// `Faults` takes a part of the protocol away, or slows it down, for tests.
template <class Faults = NoFaults>
struct DeviceAccess {
  __device__ static bool removed(Fault fault) { return Faults::removed(fault); }

  __device__ static Epoch load(const Epoch* word) { return device::load_relaxed_system(word); }
  __device__ static void store(Epoch* word, Epoch value) {
    Faults::delay();
    device::store_relaxed_system(word, value);
  }
  __device__ static Tagged load(const Tagged* word) {
    const std::uint64_t both =
        device::load_relaxed_system(reinterpret_cast<const std::uint64_t*>(word));
    return {static_cast<std::int32_t>(both), static_cast<Epoch>(both >> 32)};
  }
  __device__ static void store(Tagged* word, Tagged value) {
    Faults::delay();
    device::store_relaxed_system(
        reinterpret_cast<std::uint64_t*>(word),
        static_cast<std::uint64_t>(value.epoch) << 32 | static_cast<std::uint32_t>(value.value));
  }
  __device__ static Epoch acquire(const Epoch* word, Fault order) {
    return removed(order) ? device::load_relaxed_system(word) : device::load_acquire_system(word);
  }
  __device__ static void release(Epoch* word, Epoch value, Fault order) {
    Faults::delay();
    if (removed(order))
      device::store_relaxed_system(word, value);
    else
      device::store_release_system(word, value);
  }
  /// For a thread whose warp has used all that it has read: loads that have returned are over, and
  /// so are bulk loads whose barrier has been seen, so no later store can be seen before them. A
  /// release would wait for the stores on their way as well, a few microseconds.
  __device__ static void store_after_reads(Epoch* word, Epoch value, Fault) {
    Faults::delay();
    device::store_relaxed_system(word, value);
  }
  __device__ static std::uint32_t count_up(std::uint32_t* word) { return add(word, 1); }
  __device__ static std::uint32_t add(std::uint32_t* word, std::uint32_t count) {
    Faults::delay();
    return device::add_gpu(word, count);
  }
};

#if defined(EXPERTWIRE_TEST_FAULTS)

/// Test builds: what the host chose, in shared memory of every block.
struct BlockFaults {
  struct Chosen {
    Fault removed;
    std::uint32_t longest_delay_ns;
  };
  __device__ static Chosen& chosen() {
    __shared__ Chosen words;
    return words;
  }
  __device__ static bool removed(Fault fault) { return chosen().removed == fault; }
  /// On average every fourth call waits, up to the longest delay.
  __device__ static void delay() {
    const std::uint32_t most = chosen().longest_delay_ns;
    if (most == 0) return;
    std::uint32_t draw = static_cast<std::uint32_t>(clock64()) * 0x9E3779B9U + blockIdx.x;
    draw ^= draw >> 15;
    draw *= 0x2C1B3C6DU;
    if ((draw >> 28) % 4 == 0) __nanosleep((draw >> 4) % most);
  }
};
using KernelAccess = DeviceAccess<BlockFaults>;

#else

/// The access of the library's kernels.
using KernelAccess = DeviceAccess<>;

#endif

}  // namespace expertwire::ep::cuda
