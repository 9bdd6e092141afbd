#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "comm/memory_table.hpp"
#include "comm/transport/transport.hpp"
#include "expertwire/memory.hpp"

namespace expertwire::inline v0 {

/// What a communicator knows of registered memory: gives numbers to this rank's, and opens peers'.
class MemoryRegistry {
 public:
  /// What it needs to know of the communicator; `arenas` are host, then device memory (or null).
  struct Setting {
    const std::vector<Endpoint>& endpoints;
    int rank;
    std::uint64_t job;
    std::shared_ptr<Arena> host_arena, device_arena;
    /// The wire to memory of that kind of a rank.
    std::function<const Transport&(int rank, MemoryKind kind)> wire;
    /// What a network needs for remote writes to that memory of this rank; may be empty.
    std::function<std::string(const Memory&)> make_key;
  };

  /// Gives the arenas their numbers, the first ones, in the order of ranks.
  explicit MemoryRegistry(Setting setting);

  Memory add(void* data, std::size_t bytes, MemoryKind kind);
  Memory allocate(std::size_t bytes);
  Memory open(std::string_view serialized);
  void remove(const Memory& memory);
  const MemoryTable& table() const { return table_; }

 private:
  Memory offer(const Memory& memory);
  Arena* arena_of(MemoryKind kind) const {
    return kind == MemoryKind::host ? setting_.host_arena.get() : setting_.device_arena.get();
  }

  Setting setting_;
  MemoryTable table_;
};

}  // namespace expertwire
