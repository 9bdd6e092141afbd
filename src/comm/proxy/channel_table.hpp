#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "expertwire/error.hpp"

namespace expertwire::inline v0 {

/// What a proxy knows of a channel; made by whoever opens it.
struct ChannelState {
  std::uint32_t id = 0;
  int peer = -1;
  std::uint32_t semaphore = 0;         ///< number of the peer's memory that the next two lie in
  std::uint64_t semaphore_offset = 0;  ///< counted up by signals
  std::uint64_t farewell_offset = 0;   ///< becomes 1 when the channel ends
  std::uint64_t signalled = 0;         ///< the proxy's: signals so far
  std::uint64_t flushed = 0;           ///< flushes of CPU threads: position of the last + 1
  std::shared_ptr<std::uint64_t>
      flushed_kernels;            ///< the same of kernels, in memory that they read
  std::atomic<bool> left{false};  ///< its last trigger has been carried

  /// Notes what was wrong with a trigger; the first counts.
  void fail(const Error& error) {
    std::lock_guard lock(mutex);
    if (!failure) failure = error;
    failed.store(true, std::memory_order_release);
  }
  /// Throws what was noted.
  void check() {
    if (!failed.load(std::memory_order_acquire)) return;
    std::lock_guard lock(mutex);
    throw *failure;
  }

 private:
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::optional<Error> failure;
};

/// The channels of a communicator by number. Looking one up takes no lock; numbers come again once
/// a proxy has carried the channel's last trigger.
class ChannelTable {
 public:
  static constexpr std::uint32_t kMost = 1 << 14;

  ChannelTable() : slots_(std::make_unique<std::atomic<ChannelState*>[]>(kMost)) {}
  ChannelTable(const ChannelTable&) = delete;
  ChannelTable& operator=(const ChannelTable&) = delete;
  ~ChannelTable();

  /// Throws `Error{capacity}` when all numbers are taken.
  ChannelState& make(int peer);
  ChannelState* find(std::uint32_t id) const noexcept {
    return id < kMost ? slots_[id].load(std::memory_order_acquire) : nullptr;
  }
  /// Its user has let go; the state goes once it has left.
  void forget(ChannelState& state);
  /// Channels that are there.
  std::size_t count();

 private:
  void collect();  // under mutex_

  std::unique_ptr<std::atomic<ChannelState*>[]> slots_;
  std::mutex mutex_;
  std::uint32_t next_ = 0;
  std::vector<std::uint32_t> free_;
  std::vector<ChannelState*> leaving_;
};

}  // namespace expertwire
