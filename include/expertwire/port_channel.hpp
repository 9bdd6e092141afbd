#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "expertwire/communicator.hpp"
#include "expertwire/fifo.hpp"

namespace expertwire::inline v0 {

/// A port channel as kernels see it; pass it to a kernel by value. Its functions are in
/// expertwire/port_channel_device.cuh. Any number of threads may push; one thread pushes a whole
/// put. All return false if the time was over: then nothing was asked for. What a kernel asks for
/// is checked by the proxy: what makes no sense is refused, and the next call of the host to the
/// channel says so. Valid while the channel is.
struct PortChannelDevice {
  /// A place in registered memory.
  struct Place {
    std::uint32_t memory = Memory::kNoId;  ///< Memory::id()
    std::uint64_t offset = 0;
  };

  FifoView fifo;                       ///< of the proxy that serves the peer
  std::uint64_t* semaphore = nullptr;  ///< host memory, counted up by the peer's signals
  std::uint64_t* flushed = nullptr;    ///< host memory: flushes of kernels that are done
  std::uint32_t channel = 0;

#if defined(__CUDACC__)
  /// Queues a copy; what this thread wrote to the source before is copied. Other threads' writes
  /// are, if they are ordered before by a barrier and a fence at system scope.
  __device__ bool put(const Place& to, const Place& from, std::uint64_t bytes,
                      std::uint64_t timeout_ns) const;
  __device__ bool put_with_signal(const Place& to, const Place& from, std::uint64_t bytes,
                                  std::uint64_t timeout_ns) const;
  __device__ bool signal(std::uint64_t timeout_ns) const;
  __device__ bool atomic_add(const Place& to, std::int64_t value, std::uint64_t timeout_ns) const;
  /// Waits until what this thread pushed before is in the peer's memory.
  __device__ bool flush(std::uint64_t timeout_ns) const;
  /// Waits until the peer has signalled `count` times in all (acquire).
  __device__ bool wait(std::uint64_t count, std::uint64_t timeout_ns) const;

 private:
  __device__ bool push(Trigger trigger, std::uint64_t timeout_ns, std::uint64_t* position) const;
  __device__ bool push_put(Operation operation, const Place& to, const Place& from,
                           std::uint64_t bytes, std::uint64_t timeout_ns) const;
#endif
};

/// A channel to one peer whose work a proxy thread does: what callers ask for is queued, and
/// carried to the peer by load and store or over a network, whatever the path is.
///
/// Order: a signal, an atomic_add or what a wait() returns from is seen only after every earlier
/// put of this channel; "earlier" is the order of the calls of one thread, and of calls of several
/// threads that are ordered by other means. Nothing is promised across channels, nor between what
/// CPU threads and what kernels push to one channel.
///
/// put, signal, put_with_signal, atomic_add and flush may be called by any number of threads at a
/// time; wait by one. A call returns when the trigger is queued; while the queue is full it waits,
/// at most the communicator's timeout, then throws `Error{timeout}`. The source of a put may be
/// changed after a flush().
class PortChannel {
 public:
  /// Collective over the communicator: opens a channel to every rank; element i is that to rank i.
  /// Throws `Error{capacity}` on every rank if some rank has no room.
  static std::vector<PortChannel> open_all(const std::shared_ptr<Communicator>& communicator);

  PortChannel(PortChannel&&) noexcept;
  PortChannel& operator=(PortChannel&&) noexcept;
  /// Local. What was queued is still carried. Kernels must not use the handle any more.
  ~PortChannel();

  /// -1 of one that has been moved from, of which other calls throw `Error{invalid_usage}`.
  int peer() const noexcept;

  /// Copies bytes of memory of this rank into memory of the peer, both registered (arenas are).
  /// Throws `Error{invalid_argument}` if they are not, or if the ranges lie outside.
  void put(const PutRequest& request);
  /// Counts the peer's semaphore of this channel up by one.
  void signal();
  /// put, then signal, in one trigger.
  void put_with_signal(const PutRequest& request);
  /// Adds to a signed 64-bit word, 8-byte aligned, of the peer's registered memory; it wraps as
  /// two's complement. Any rank may add to the same word.
  void atomic_add(const AtomicAddRequest& request);
  /// Returns when everything that this thread asked for before is in the peer's memory. Throws
  /// `Error{timeout}` or `Error{peer_lost}`, naming the peer, and what was wrong with a trigger of
  /// a kernel if anything was.
  void flush(std::chrono::milliseconds timeout);
  /// Waits for the next signal of the peer (acquire). Throws `Error{timeout}` or
  /// `Error{peer_lost}`, naming the peer.
  void wait(std::chrono::milliseconds timeout);
  /// The channel for kernels. Throws `Error{invalid_usage}` on the CPU backend.
  PortChannelDevice device() const;

 private:
  struct Impl;
  explicit PortChannel(std::unique_ptr<Impl> impl);
  Impl& open() const;
  std::unique_ptr<Impl> impl_;
};

}  // namespace expertwire
