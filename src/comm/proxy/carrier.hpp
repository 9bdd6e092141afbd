#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>

#include "comm/memory_table.hpp"
#include "expertwire/fifo.hpp"

namespace expertwire::inline v0 {

/// What is carried to a peer: a trigger whose memories have been looked up and checked.
struct Cargo {
  Operation operation = Operation::none;  ///< put, store or atomic_add
  const std::byte* source = nullptr;      ///< of a put
  MemoryKind source_kind = MemoryKind::host;
  const MemoryTable::Entry* destination = nullptr;
  std::uint64_t offset = 0;  ///< in the destination
  std::uint64_t bytes = 0;   ///< of a put
  std::int64_t value = 0;    ///< of a store or an add
};

/// A word at which somebody waits for a flush; it only grows.
struct FlushMark {
  std::uint64_t* word = nullptr;
  std::uint64_t value = 0;
};

/// How a proxy writes to one peer. All calls by the proxy, one at a time, none of which waits.
///
/// Order: what a store or an add writes becomes visible to an acquiring reader only after all puts
/// that were carried before it.
class Carrier {
 public:
  using Clock = std::chrono::steady_clock;

  Carrier() = default;
  Carrier(const Carrier&) = delete;
  Carrier& operator=(const Carrier&) = delete;
  virtual ~Carrier() = default;

  /// Whether carry() may be called now; if not, progress() makes room.
  virtual bool has_room() const { return true; }
  virtual void carry(const Cargo& cargo) = 0;
  /// Releases `mark` once everything carried before is in the peer's memory.
  virtual void flush(const FlushMark& mark) = 0;
  /// Moves what can be moved; whether anything was.
  virtual bool progress() { return false; }
  /// Whether everything carried has left.
  virtual bool idle() const { return true; }
  /// About every millisecond: timers.
  virtual void tick(Clock::time_point) {}
  /// By any thread: somebody waits for the peer.
  virtual void expect() noexcept {}
  /// The last call: tells the peer that nothing follows.
  virtual void say_goodbye() {}
};

}  // namespace expertwire
