#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "expertwire/deadline.hpp"

namespace expertwire::inline v0 {

/// Where memory is: host memory, or memory of a CUDA device, which the host does not touch.
enum class MemoryKind : std::uint8_t { host = 0, cuda = 1 };

/// A rank's memory as this process can reach it. A small value; copies are cheap.
class Memory {
 public:
  /// Of memory that its communicator does not know by a number.
  static constexpr std::uint32_t kNoId = UINT32_MAX;

  Memory() = default;
  Memory(int rank, std::shared_ptr<std::byte> mapping, std::size_t bytes,
         MemoryKind kind = MemoryKind::host)
      : rank_(rank), mapping_(std::move(mapping)), bytes_(bytes), kind_(kind) {}

  /// The rank whose memory it is.
  int rank() const noexcept { return rank_; }
  std::size_t bytes() const noexcept { return bytes_; }
  MemoryKind kind() const noexcept { return kind_; }
  /// Where it is mapped here, or null when only a network reaches it. Valid while this object or
  /// the communicator lives; of memory that a user has registered, while that is.
  std::byte* data() const noexcept { return mapping_.get(); }
  const std::shared_ptr<std::byte>& shared() const noexcept { return mapping_; }
  /// Its number at the communicator that it was registered with or opened by, else kNoId: what a
  /// proxy, or a kernel that asks one, knows it by.
  std::uint32_t id() const noexcept { return id_; }

  /// What a peer opens it with (Communicator::open_memory): bytes to be sent by whatever way there
  /// is. Throws `Error{invalid_usage}` unless it is memory of this rank that is registered.
  std::string serialize() const;

 private:
  friend struct CommunicatorAccess;
  int rank_ = -1;
  std::shared_ptr<std::byte> mapping_;
  std::size_t bytes_ = 0;
  MemoryKind kind_ = MemoryKind::host;
  std::uint32_t id_ = kNoId;
  std::shared_ptr<const std::string> offer_;  // what serialize() gives
};

/// One block of memory a rank, mapped by all ranks that reach it when the communicator is made.
///
/// Objects carve what they need out of their own rank's part; that is a local call. On the CPU the
/// block is a sparse memfd, so pages exist only once they are touched and nothing has a name in the
/// file system. On CUDA it is device memory, taken whole when the communicator is made.
class Arena {
 public:
  /// What becomes of pages that are given back. Those that a device has mapped are kept: it would
  /// go on with the old ones.
  enum class Pages : std::uint8_t { given_back = 0, kept = 1 };

  Arena(std::vector<Memory> parts, int rank, Pages pages = Pages::given_back);

  const Memory& local() const { return part(rank_); }
  /// Memory of `rank`, 0 <= rank < size.
  const Memory& part(int rank) const { return parts_[static_cast<std::size_t>(rank)]; }

  /// Takes `bytes` of this rank's part, aligned to 4096 bytes, and returns the offset. The content
  /// is unspecified. Where there will be room once something comes back (see give_back_when) it
  /// waits for that until `patience` ends. Throws `Error{capacity}` that says how much is left.
  /// Thread-safe.
  std::uint64_t carve(std::size_t bytes, const Deadline& patience = Deadline::after({}));
  /// Returns what carve() gave. Pages go back to the operating system, unless they are kept.
  void give_back(std::uint64_t offset) noexcept;
  /// The same once `safe()` is true, which carve() and carved() look at; at once if it is now.
  void give_back_when(std::uint64_t offset, std::function<bool()> safe);
  /// Bytes carved now.
  std::size_t carved();

 private:
  using Pieces = std::map<std::uint64_t, std::size_t>;  // offset to size
  struct Gap {
    bool fits = false;
    std::uint64_t offset = 0, largest = 0;
  };
  Gap find_gap(std::size_t bytes, const Pieces& taken) const;
  void release_safe();                 // under mutex_
  void release(std::uint64_t offset);  // under mutex_

  std::vector<Memory> parts_;
  int rank_;
  Pages pages_;

  std::mutex mutex_;
  Pieces taken_;
  std::map<std::uint64_t, std::function<bool()>> leaving_;
};

}  // namespace expertwire
