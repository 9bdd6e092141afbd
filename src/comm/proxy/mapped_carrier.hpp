#pragma once

#include <atomic>
#include <cstring>

#include "comm/proxy/carrier.hpp"

namespace expertwire::inline v0 {

/// Applies a store or an add to a word of host memory: a release, so that an acquiring reader sees
/// what was written before.
inline void apply_to_word(std::byte* word, Operation operation, std::int64_t value) {
  const std::atomic_ref target(*reinterpret_cast<std::uint64_t*>(word));
  if (operation == Operation::store)
    target.store(static_cast<std::uint64_t>(value), std::memory_order_release);
  else
    target.fetch_add(static_cast<std::uint64_t>(value), std::memory_order_acq_rel);
}

inline void release_mark(const FlushMark& mark) {
  std::atomic_ref(*mark.word).store(mark.value, std::memory_order_release);
}

/// To a peer whose host memory is mapped here: everything is done when carry() returns.
class MappedCarrier final : public Carrier {
 public:
  void carry(const Cargo& cargo) override {
    std::byte* to = cargo.destination->data + cargo.offset;
    if (cargo.operation != Operation::put)
      apply_to_word(to, cargo.operation, cargo.value);
    else if (cargo.bytes > 0)
      std::memmove(to, cargo.source, cargo.bytes);
  }
  void flush(const FlushMark& mark) override { release_mark(mark); }
};

}  // namespace expertwire
