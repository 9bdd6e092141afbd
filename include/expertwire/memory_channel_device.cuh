#pragma once

// The device side of expertwire/memory_channel.hpp.

#include <cuda/atomic>
#include <cuda/std/chrono>

#include "expertwire/memory_channel.hpp"

namespace expertwire::inline v0 {

__device__ inline void MemoryChannelDevice::put(std::uint64_t offset, const void* source,
                                                std::size_t count, int thread, int threads) const {
  auto* to = reinterpret_cast<int4*>(peer_inbox + offset);
  const auto* from = static_cast<const int4*>(source);
  for (std::size_t i = thread; i < count / sizeof(int4); i += threads) to[i] = from[i];
}

__device__ inline void MemoryChannelDevice::signal() const {
  cuda::atomic_ref<std::uint64_t, cuda::thread_scope_system>(*peer_semaphore)
      .fetch_add(1, cuda::memory_order_release);
}

__device__ inline bool MemoryChannelDevice::wait(std::uint64_t count,
                                                 std::uint64_t timeout_ns) const {
  const cuda::atomic_ref<std::uint64_t, cuda::thread_scope_system> word(*semaphore);
  const auto start = cuda::std::chrono::system_clock::now();
  const auto budget = cuda::std::chrono::nanoseconds(timeout_ns);
  while (word.load(cuda::memory_order_acquire) < count)
    if (cuda::std::chrono::system_clock::now() - start > budget) return false;
  return true;
}

__device__ inline void MemoryChannelDevice::atomic_add(std::uint64_t offset,
                                                       std::int64_t value) const {
  auto* word = reinterpret_cast<std::int64_t*>(peer_inbox + offset);
  cuda::atomic_ref<std::int64_t, cuda::thread_scope_system>(*word).fetch_add(
      value, cuda::memory_order_release);
}

}  // namespace expertwire
