#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "comm/shared_block.hpp"
#include "ep/protocol/row_format.hpp"
#include "ep/protocol/slots.hpp"
#include "expertwire/communicator.hpp"
#include "expertwire/shape.hpp"

namespace expertwire::inline v0::ep {

/// What ranks must agree on when they make an object together.
struct Agreement {
  std::int32_t mode;  ///< 0 low latency, 1 high throughput
  std::int32_t hidden, experts, top_k, max_tokens, dtype;
  std::int32_t lanes;
  std::uint32_t first_epoch;
  std::int64_t pool_rows = 0;  ///< of high throughput, as the next
  std::int32_t ring_frames = 0;
};

/// What both modes' layouts and agreements take from the options.
SlotSizes slot_sizes(const MoeShape& shape, int ranks);
Agreement agreement_on(int mode, const MoeShape& shape, int lanes);

/// The part of every rank's arena that one object uses: `lanes` pieces of equal layout.
class Region {
 public:
  struct Request {
    /// For a layout of either mode.
    template <class Slots>
    static Request of(const Agreement& agreement, const Slots& slots) {
      return {agreement, slots.bytes, slots.pairs, {slots.dispatch.words, slots.combine.words}};
    }

    Agreement agreement;
    std::uint64_t lane_bytes;
    Pairs pairs;
    std::vector<std::uint64_t> counters;  ///< offsets of the DirectionWords before the pairs
  };

  /// Collective. Throws `Error{mismatch}` that names the first thing ranks disagree on.
  Region(const std::shared_ptr<Communicator>& communicator, const Request& request);

  Communicator& communicator() const { return block_.communicator(); }
  const Pairs& pairs() const { return pairs_; }
  /// How this rank reaches `rank` in `lane`.
  const Peer& peer(int rank, int lane) const {
    return peers_[static_cast<std::size_t>(lane * communicator().size() + rank)];
  }
  /// Of each lane, other ranks that are reached through host memory.
  int staged_peers() const;

 private:
  std::byte* own_lane(int lane) const;
  Peer find_peer(int rank, int lane) const;
  void set_words(const Request& request) const;

  SharedBlock block_;
  std::uint64_t lane_bytes_;
  Pairs pairs_;
  std::vector<Peer> peers_;  // [lane][rank]
};

}  // namespace expertwire::ep
