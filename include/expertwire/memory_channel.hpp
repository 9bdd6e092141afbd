#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "expertwire/communicator.hpp"

namespace expertwire::inline v0 {

/// A channel as kernels see it; pass it to a kernel by value. Its functions are in
/// expertwire/memory_channel_device.cuh. Counts are absolute: a kernel says which signal it waits
/// for, and the host's n-th wait() is for the n-th. Valid while the channel is.
struct MemoryChannelDevice {
  std::byte* inbox = nullptr;               ///< where the peer's puts arrive
  std::byte* peer_inbox = nullptr;          ///< where this rank's puts go
  std::uint64_t* semaphore = nullptr;       ///< counted up by the peer's signals
  std::uint64_t* peer_semaphore = nullptr;  ///< counted up by this rank's
  std::size_t bytes = 0;                    ///< of an inbox

#if defined(__CUDACC__)
  /// Copies `count` bytes to `offset` of the peer's inbox, by the `threads` threads that call with
  /// `thread`. All of `offset`, `source` and `count` are multiples of 16; what is past the last is
  /// not copied.
  __device__ void put(std::uint64_t offset, const void* source, std::size_t count, int thread,
                      int threads) const;
  /// Called by one thread after a barrier of those that put: releases their puts at system scope.
  __device__ void signal() const;
  /// Called by one thread: waits until the peer has signalled `count` times in all, and acquires
  /// what it put before. False if that took longer than `timeout_ns`.
  __device__ bool wait(std::uint64_t count, std::uint64_t timeout_ns) const;
  /// Adds to a signed 64-bit word of the peer's inbox, 8-byte aligned; any thread, any number at
  /// the same time. Ordered after the calling thread's puts, like a signal.
  __device__ void atomic_add(std::uint64_t offset, std::int64_t value) const;
#endif
};

/// A pair of buffers between this rank and one peer that it reaches by load and store, written by
/// load and store.
///
/// `put` writes into the peer's inbox; `signal` tells the peer; `wait` waits for one signal of the
/// peer. A signal is seen only after every earlier put of this channel. One thread at a time may
/// put and signal, and one may wait. On the CUDA backend inboxes are device memory; the host's
/// calls are then queued on a stream of the channel's own, and are for set-up and tests.
class MemoryChannel {
 public:
  /// Collective over the communicator: opens a channel to every rank, with inboxes of `bytes`.
  /// Element i is the channel to rank i. Throws `Error{unsupported}` if a rank's memory is not
  /// mapped here, `Error{mismatch}` if ranks want other sizes, `Error{capacity}` if the arena is
  /// too small.
  static std::vector<MemoryChannel> open_all(const std::shared_ptr<Communicator>& communicator,
                                             std::size_t bytes);

  MemoryChannel(MemoryChannel&&) noexcept;
  MemoryChannel& operator=(MemoryChannel&&) noexcept;
  ~MemoryChannel();

  /// -1 of one that has been moved from, of which other calls throw `Error{invalid_usage}`.
  int peer() const noexcept;
  /// Where the peer's puts arrive.
  std::byte* inbox() const noexcept;
  std::size_t bytes() const noexcept;

  /// Copies `bytes` at `source` to `offset` of the peer's inbox. CUDA: queued; `source`, host or
  /// device memory, stays as it is until the peer has seen a later signal(). Throws
  /// `Error{invalid_argument}` if the bytes do not fit.
  void put(std::uint64_t offset, const void* source, std::size_t bytes);
  /// Counts the peer's semaphore up by one (release).
  void signal();
  /// The channel for kernels. Throws `Error{invalid_usage}` on the CPU backend.
  MemoryChannelDevice device() const;
  /// Waits for the next signal of the peer (acquire). Throws `Error{timeout}` or
  /// `Error{peer_lost}`, naming the peer.
  void wait(std::chrono::milliseconds timeout);

 private:
  struct Impl;
  explicit MemoryChannel(std::unique_ptr<Impl> impl);
  void check_open() const;
  std::unique_ptr<Impl> impl_;
};

}  // namespace expertwire
