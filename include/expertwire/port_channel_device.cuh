#pragma once

// The device side of expertwire/port_channel.hpp.

#include <cuda/atomic>
#include <cuda/std/chrono>

#include "expertwire/port_channel.hpp"

namespace expertwire::inline v0 {

/// How kernels read and write the words of a proxy's queue: its head and what was seen of its tail
/// are memory of the device, turns and the tail itself are host memory.
struct DeviceFifoAccess {
  using DeviceWord = cuda::atomic_ref<std::uint64_t, cuda::thread_scope_device>;
  using SystemWord = cuda::atomic_ref<std::uint64_t, cuda::thread_scope_system>;

  static constexpr __device__ bool removed(FifoPart) { return false; }
  static __device__ std::uint64_t load(std::uint64_t* word) {
    return DeviceWord(*word).load(cuda::memory_order_relaxed);
  }
  static __device__ std::uint64_t acquire(std::uint64_t* word) {
    return SystemWord(*word).load(cuda::memory_order_acquire);
  }
  static __device__ void release(std::uint64_t* word, std::uint64_t value, FifoPart) {
    SystemWord(*word).store(value, cuda::memory_order_release);
  }
  static __device__ bool compare_exchange(std::uint64_t* word, std::uint64_t expected,
                                          std::uint64_t value) {
    return DeviceWord(*word).compare_exchange_strong(expected, value, cuda::memory_order_relaxed);
  }
  static __device__ void write(Trigger* slot, const Trigger& trigger) {
    slot->source_offset = trigger.source_offset;
    slot->destination_offset = trigger.destination_offset;
    slot->bytes = trigger.bytes;
    slot->value = trigger.value;
    slot->channel = trigger.channel;
    slot->source = trigger.source;
    slot->destination = trigger.destination;
    slot->operation = trigger.operation;
  }
};

namespace port_channel_device {

/// Polls until `ready()` or the time is over; whether it was ready.
template <class Ready>
__device__ bool poll(std::uint64_t timeout_ns, Ready ready) {
  if (ready()) return true;
  const auto start = cuda::std::chrono::system_clock::now();
  const auto budget = cuda::std::chrono::nanoseconds(timeout_ns);
  while (!ready())
    if (cuda::std::chrono::system_clock::now() - start > budget) return false;
  return true;
}

}  // namespace port_channel_device

__device__ inline bool PortChannelDevice::push(Trigger trigger, std::uint64_t timeout_ns,
                                               std::uint64_t* position) const {
  trigger.channel = channel;
  const bool claimed = port_channel_device::poll(
      timeout_ns, [&] { return claim<DeviceFifoAccess>(fifo, position); });
  if (claimed) commit<DeviceFifoAccess>(fifo, *position, trigger);
  return claimed;
}

__device__ inline bool PortChannelDevice::put(const Place& to, const Place& from,
                                              std::uint64_t bytes, std::uint64_t timeout_ns) const {
  return push_put(Operation::put, to, from, bytes, timeout_ns);
}

__device__ inline bool PortChannelDevice::put_with_signal(const Place& to, const Place& from,
                                                          std::uint64_t bytes,
                                                          std::uint64_t timeout_ns) const {
  return push_put(Operation::put_with_signal, to, from, bytes, timeout_ns);
}

__device__ inline bool PortChannelDevice::push_put(Operation operation, const Place& to,
                                                   const Place& from, std::uint64_t bytes,
                                                   std::uint64_t timeout_ns) const {
  Trigger trigger;
  trigger.operation = operation;
  trigger.destination = to.memory;
  trigger.destination_offset = to.offset;
  trigger.source = from.memory;
  trigger.source_offset = from.offset;
  trigger.bytes = bytes;
  std::uint64_t position = 0;
  return push(trigger, timeout_ns, &position);
}

__device__ inline bool PortChannelDevice::signal(std::uint64_t timeout_ns) const {
  Trigger trigger;
  trigger.operation = Operation::signal;
  std::uint64_t position = 0;
  return push(trigger, timeout_ns, &position);
}

__device__ inline bool PortChannelDevice::atomic_add(const Place& to, std::int64_t value,
                                                     std::uint64_t timeout_ns) const {
  Trigger trigger;
  trigger.operation = Operation::atomic_add;
  trigger.destination = to.memory;
  trigger.destination_offset = to.offset;
  trigger.value = value;
  std::uint64_t position = 0;
  return push(trigger, timeout_ns, &position);
}

__device__ inline bool PortChannelDevice::flush(std::uint64_t timeout_ns) const {
  Trigger trigger;
  trigger.operation = Operation::flush;
  std::uint64_t position = 0;
  if (!push(trigger, timeout_ns, &position)) return false;
  return port_channel_device::poll(timeout_ns,
                                   [&] { return DeviceFifoAccess::acquire(flushed) > position; });
}

__device__ inline bool PortChannelDevice::wait(std::uint64_t count,
                                               std::uint64_t timeout_ns) const {
  return port_channel_device::poll(timeout_ns,
                                   [&] { return DeviceFifoAccess::acquire(semaphore) >= count; });
}

}  // namespace expertwire
