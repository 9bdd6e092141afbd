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
struct Peer {
  std::byte* out = nullptr;       ///< where this rank writes what is for it: a pair
  const std::byte* in = nullptr;  ///< where this rank finds what it wrote: a pair
  std::byte* lane = nullptr;      ///< its lane, which this rank can load from and store to
};

/// What both modes keep for one direction of a lane.
struct DirectionSlots {
  static constexpr Epoch kHeaderSlots = 4;

  std::uint64_t words = 0;     ///< of the lane: DirectionWords
  std::uint64_t consumed = 0;  ///< of a pair: Epoch, the latest that its writer has read
  std::uint64_t headers = 0;   ///< of a pair: CallLine [kHeaderSlots]

  static constexpr DirectionSlots place(Placer& own, Placer& pair) {
    return {own.take(sizeof(DirectionWords)), pair.take(sizeof(Epoch)),
            pair.take(kHeaderSlots * sizeof(CallLine))};
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t header_of(Epoch n) const {
    return headers + n % kHeaderSlots * sizeof(CallLine);
  }
};

}  // namespace expertwire::ep
