#pragma once

// What one rank writes at one other, and where. Shared by host and device.
//
// A lane's memory begins with words of the rank's own. Behind them lie its pairs, one for every
// rank: all that this rank writes there, and nothing else, words first and rows behind them. Every
// rank's lane has the same layout, so a writer computes addresses at its peers from nothing but
// where its pair there begins.
//
// All offsets are in bytes; sizes are 64 bits, because a row's offset passes 2^31 quickly.

#include <cstddef>
#include <cstdint>

#include "ep/protocol/call.hpp"
#include "ep/protocol/lane.hpp"
#include "expertwire/host_device.hpp"

namespace expertwire::inline v0::ep {

inline constexpr std::uint64_t kAlignment = 128;

EXPERTWIRE_HOST_DEVICE constexpr std::uint64_t align_up(std::uint64_t value, std::uint64_t to) {
  return (value + to - 1) / to * to;
}

/// Lays one array behind the other.
class Placer {
 public:
  constexpr std::uint64_t take(std::uint64_t bytes) {
    const std::uint64_t offset = end_;
    end_ = align_up(end_ + bytes, kAlignment);
    return offset;
  }
  constexpr std::uint64_t bytes() const { return end_; }

 private:
  std::uint64_t end_ = 0;
};

/// Where the pairs of a lane lie.
struct Pairs {
  std::uint64_t first = 0;       ///< of the lane; what is before are the rank's own words
  std::uint64_t bytes = 0;       ///< from pair to pair
  std::uint64_t word_bytes = 0;  ///< words and flags at the start of each

  /// The pair that `writer` writes.
  constexpr std::uint64_t of(int writer) const {
    return first + static_cast<std::uint64_t>(writer) * bytes;
  }
};

/// How a rank reaches one other, or itself: an entry of a small table that kernels read.
///
/// A *mapped* peer's memory is loaded from and stored to: `out` is there, `in` in this rank's own
/// memory. Of a *staged* peer both are in host memory that the GPUs of the two ranks map; its lane
/// is out of reach, and what it writes to the words of `in` is carried to this rank's own memory
/// before anybody waits for it (see cuda/kernel/courier.cuh).
struct Peer {
  std::byte* out = nullptr;       ///< where this rank writes what is for it: a pair
  const std::byte* in = nullptr;  ///< where this rank finds the rows that it wrote: a pair
  std::byte* lane = nullptr;      ///< its lane; null if it is staged
};

/// Words of a pair that lie side by side; offsets of it, multiples of kAlignment.
struct Stretch {
  std::uint64_t begin = 0, end = 0;
};

/// What both modes keep for one direction of a lane. Words of a pair are of three kinds: those that
/// are *told*, which lie in one stretch; the *control* words, one line, which say that everything
/// that was told before is there; and flags of rows, in another stretch.
struct DirectionSlots {
  static constexpr Epoch kHeaderSlots = 4;

  std::uint64_t words = 0;    ///< of the lane: DirectionWords
  std::uint64_t control = 0;  ///< of a pair: Control
  std::uint64_t headers = 0;  ///< of a pair: CallLine [kHeaderSlots]; what else is told lies behind
  Stretch told, rows;         ///< of a pair

  struct Control {
    Epoch consumed;       ///< the latest that the pair's writer has read
    Epoch flags[kSlots];  ///< what it announces once in an operation
    Epoch unused;
  };
  static_assert(sizeof(Control) == 16);

  /// Its control words, then what is told: the headers, and `more` bytes.
  static constexpr DirectionSlots place(Placer& own, Placer& pair, std::uint64_t more) {
    DirectionSlots d;
    d.words = own.take(sizeof(DirectionWords));
    d.control = pair.take(sizeof(Control));
    d.headers = pair.take(kHeaderSlots * sizeof(CallLine) + more);
    d.told = {d.headers, pair.bytes()};
    return d;
  }
  /// Where the told words behind the headers are.
  constexpr std::uint64_t behind_headers() const {
    return headers + kHeaderSlots * sizeof(CallLine);
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t header_of(Epoch n) const {
    return headers + n % kHeaderSlots * sizeof(CallLine);
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t consumed() const { return control; }
  EXPERTWIRE_HOST_DEVICE std::uint64_t flag_of(Epoch n) const {
    return control + (1 + static_cast<std::uint64_t>(slot_of(n))) * sizeof(Epoch);
  }
};

}  // namespace expertwire::ep
