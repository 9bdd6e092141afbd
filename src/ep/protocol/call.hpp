#pragma once

// What an operation says about itself. Every operation of every rank tells every rank, before any
// row of it, what it is about, and whoever receives compares: calls that do not belong together are
// an error on both sides, in place of wrong values. Shared by host and device.
//
// A header is a line of words that carry their epoch, so it needs no flag and is no barrier: an
// operation waits for the headers of those whose rows it takes, and for no other's. Those are
// compared two operations on, with the credit of this one: whoever has read an operation has sent
// its header. Until then a header must stay where it is, hence four of them (kHeaderSlots).

#include <cstdint>
#include <string>

#include "ep/protocol/lane.hpp"

namespace expertwire::inline v0::ep {

struct Call {
  enum Option : std::int32_t {
    kNoTokens = 1,  ///< a rank without tokens has no say about their weights
    kWeights = 2,   ///< weights are sent by this combine
    kCapacity = 4,  ///< the caller knows how many rows there is room for
    kCached = 8,    ///< the routing of an earlier dispatch is taken
    kPool = 16,     ///< rows of the dispatch stay in the receivers' pools
    kGrouped = 32,  ///< rows are grouped by expert: their positions travel with them
  };
  std::int32_t options = 0;  ///< 8 bits, as the two below
  std::int32_t format = 0;   ///< RowFormat::word() of the rows that travel
  std::int32_t lane = 0;     ///< of the dispatch that it is about; its epoch is known where it runs
  std::int32_t hidden = 0;
  std::int32_t top_k = 0;       ///< 8 bits
  std::int32_t experts = 0;     ///< 24 bits
  std::int32_t max_tokens = 0;  ///< low latency

  /// As they travel, in the order in which they are compared.
  enum Word : std::int32_t {
    kKind,  ///< options, format << 8, lane << 16
    kHidden,
    kRouting,  ///< experts, top_k << 24
    kMaxTokens,
    kDispatch,
    kWords
  };
  /// `dispatch` is the epoch of the dispatch that it is about: graphs are replayed in others.
  EXPERTWIRE_HOST_DEVICE std::int32_t word(int i, Epoch dispatch) const {
    switch (i) {
      case kKind:
        return options | format << 8 | lane << 16;
      case kHidden:
        return hidden;
      case kRouting:
        return experts | top_k << 24;
      case kMaxTokens:
        return max_tokens;
      default:
        return static_cast<std::int32_t>(dispatch);
    }
  }
  EXPERTWIRE_HOST_DEVICE static constexpr bool agree(int word, std::int32_t a, std::int32_t b) {
    const bool neutral = word == kKind && ((a | b) & kNoTokens) != 0;
    const std::int32_t ignored = word != kKind ? 0 : neutral ? kNoTokens | kWeights : kNoTokens;
    return ((a ^ b) & ~ignored) == 0;
  }
};

/// The header of a call, as it lies in memory.
struct CallLine {
  Tagged words[8];
};
static_assert(sizeof(CallLine) == 64 && Call::kWords <= 8);

/// Where two ranks' calls differ.
struct Mismatch {
  std::int32_t word, theirs, ours;
};

/// A sentence that names both ranks and both values.
std::string describe(const char* operation, const Mismatch& mismatch, int peer, int rank);

}  // namespace expertwire::ep
