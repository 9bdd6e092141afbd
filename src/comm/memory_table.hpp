#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "expertwire/memory.hpp"

namespace expertwire::inline v0 {

/// The memories that one communicator knows by number: this rank's, and those of peers that it has
/// opened. Numbers are not used twice, so a late message never meets memory that came after.
/// Looking one up takes no lock.
class MemoryTable {
 public:
  static constexpr std::uint32_t kMost = 1 << 20;

  struct Entry {
    int rank = -1;
    MemoryKind kind = MemoryKind::host;
    std::byte* data = nullptr;  ///< null: not mapped here
    std::uint64_t bytes = 0;
    std::uint32_t remote_id = Memory::kNoId;  ///< what the owner knows it by
    std::string key;                          ///< for remote writes; empty: none
    std::uint64_t address = 0;                ///< in the process of the owner
  };

  MemoryTable() = default;
  MemoryTable(const MemoryTable&) = delete;
  MemoryTable& operator=(const MemoryTable&) = delete;
  ~MemoryTable();

  /// The number that the next entry will have. Throws `Error{capacity}` when all are used.
  std::uint32_t reserve();
  /// Keeps `memory` alive until it is removed.
  void set(std::uint32_t id, const Memory& memory, std::uint32_t remote_id, std::string key = {},
           std::uint64_t address = 0);
  /// Null if there is none. Valid until the entry has been removed and the table is gone.
  const Entry* find(std::uint32_t id) const noexcept;
  /// Lets go of the memory; whether it was there.
  bool remove(std::uint32_t id);

 private:
  static constexpr std::uint32_t kPerPage = 1024;
  struct Slot {
    Entry entry;
    std::shared_ptr<std::byte> owner;
    std::atomic<bool> present{false};
  };
  struct Page {
    std::array<Slot, kPerPage> slots;
  };
  Slot* slot(std::uint32_t id) const noexcept;

  std::mutex mutex_;
  std::uint32_t next_ = 0;
  std::array<std::atomic<Page*>, kMost / kPerPage> pages_{};
};

}  // namespace expertwire
