#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "expertwire/communicator.hpp"

namespace expertwire {

/// A pair of buffers between this rank and one peer of its domain, written by load and store.
///
/// `put` writes into the peer's inbox; `signal` tells the peer; `wait` waits for one signal of the
/// peer. A signal is seen only after every earlier put of this channel. One thread at a time may
/// put and signal, and one may wait.
class MemoryChannel {
 public:
  /// Collective over the communicator: opens a channel to every rank, with inboxes of `bytes`.
  /// Element i is the channel to rank i. Throws `Error{unsupported}` if a rank is outside this
  /// rank's domain.
  static std::vector<MemoryChannel> open_all(const std::shared_ptr<Communicator>& communicator,
                                             std::size_t bytes);

  MemoryChannel(MemoryChannel&&) noexcept;
  MemoryChannel& operator=(MemoryChannel&&) noexcept;
  ~MemoryChannel();

  int peer() const noexcept;
  /// Where the peer's puts arrive.
  std::byte* inbox() const noexcept;
  std::size_t bytes() const noexcept;

  /// Copies `bytes` at `source` to `offset` of the peer's inbox.
  void put(std::uint64_t offset, const void* source, std::size_t bytes);
  /// Counts the peer's semaphore up by one (release).
  void signal();
  /// Waits for the next signal of the peer (acquire). Throws `Error{timeout}` or
  /// `Error{peer_lost}`, naming the peer.
  void wait(std::chrono::milliseconds timeout);

 private:
  struct Impl;
  explicit MemoryChannel(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace expertwire
