#pragma once

// Where things lie in a lane's memory. Every rank's lane has the same layout, so that a writer
// computes addresses at its peers from nothing but the peer's base. Shared by host and device.
//
// All offsets are in bytes from the start of the lane; sizes are 64 bits, because a row's offset
// passes 2^31 quickly.
//
// An object is made for the most that it may meet (its capacity), and every call brings sizes of
// its own. Places follow from the capacity, so that no payload of any call ever covers a word of
// another, which could hold the epoch that is waited for. What lies at a place follows from the
// call.

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

/// What both modes keep for one direction of a lane.
struct DirectionSlots {
  static constexpr Epoch kHeaderSlots = 4;

  std::uint64_t words = 0;     ///< DirectionWords
  std::uint64_t consumed = 0;  ///< Epoch [R], element r written by rank r
  std::uint64_t headers = 0;   ///< CallLine [kHeaderSlots][R], the same
  std::uint64_t ranks = 1;

  static constexpr DirectionSlots place(Placer& placer, std::uint64_t ranks) {
    return {placer.take(sizeof(DirectionWords)), placer.take(ranks * sizeof(Epoch)),
            placer.take(kHeaderSlots * ranks * sizeof(CallLine)), ranks};
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t header_of(Epoch n, int source) const {
    return headers +
           (n % kHeaderSlots * ranks + static_cast<std::uint64_t>(source)) * sizeof(CallLine);
  }
};

/// One selection of a token, as it travels with the row.
struct Selection {
  std::int32_t expert;    ///< below 0: none
  std::int32_t position;  ///< index among the source's selections of that expert
  float weight;           ///< 1 if the dispatch came without weights
};
static_assert(sizeof(Selection) == 12);

/// Goes before the payload of a low-latency row. All K selections of the token follow, so that the
/// row is the same for every rank; each takes those of its experts.
struct RowHeader {
  std::int32_t token;  ///< index at the source
  std::int32_t unused;
};
static_assert(sizeof(RowHeader) == 8);

/// The sizes that a layout follows from.
struct SlotSizes {
  std::uint64_t ranks = 1;          ///< R
  std::uint64_t local_experts = 1;  ///< L
  std::uint64_t max_tokens = 1;     ///< M
  std::uint64_t top_k = 1;          ///< K
  std::uint64_t row_bytes = 16;     ///< payload of a row of the row type; fp8 rows are smaller
  std::uint64_t pool_rows = 0;      ///< high throughput: rows of one receive pool
  std::uint64_t scales = 1;         ///< high throughput: of an fp8 row
};

/// A lane of the low-latency mode. Arrays that start with [slot][peer] are regions that belong to
/// one peer each: it alone writes there.
struct LowLatencySlots {
  /// The counts of a source: how many rows, then selections per local expert.
  static constexpr int kRows = 0, kHeader = 1;

  SlotSizes most;   ///< the capacity
  SlotSizes sizes;  ///< of the call
  DirectionSlots dispatch, combine;
  std::uint64_t header_bytes = 0;     ///< RowHeader and K selections, of the call
  std::uint64_t dispatch_stride = 0;  ///< from row to row
  std::uint64_t counts_stride = 0;
  std::uint64_t counts = 0;                           ///< [slot][source] Tagged [kHeader + L]
  std::uint64_t dispatch_rows = 0, row_flags = 0;     ///< [slot][source][M]
  std::uint64_t weights = 0, weight_flags = 0;        ///< [slot][source][M][K], [slot][source]
  std::uint64_t partial_rows = 0, partial_flags = 0;  ///< [slot][expert rank][M]
  std::uint64_t bytes = 0;

  EXPERTWIRE_HOST_DEVICE static constexpr std::uint64_t header_bytes_of(const SlotSizes& sizes) {
    return align_up(sizeof(RowHeader) + sizes.top_k * sizeof(Selection), 64);
  }
  static constexpr LowLatencySlots place(const SlotSizes& sizes) {
    LowLatencySlots s;
    s.most = s.sizes = sizes;
    s.header_bytes = header_bytes_of(sizes);
    s.dispatch_stride = s.header_bytes + align_up(sizes.row_bytes, 64);
    s.counts_stride = align_up((kHeader + sizes.local_experts) * sizeof(Tagged), 64);
    const std::uint64_t regions = kSlots * sizes.ranks, rows = regions * sizes.max_tokens;
    Placer placer;
    s.dispatch = DirectionSlots::place(placer, sizes.ranks);
    s.combine = DirectionSlots::place(placer, sizes.ranks);
    s.counts = placer.take(regions * s.counts_stride);
    s.row_flags = placer.take(rows * sizeof(Epoch));
    s.weight_flags = placer.take(regions * sizeof(Epoch));
    s.partial_flags = placer.take(rows * sizeof(Epoch));
    s.weights = placer.take(rows * sizes.top_k * sizeof(float));
    s.dispatch_rows = placer.take(rows * s.dispatch_stride);
    s.partial_rows = placer.take(rows * sizes.row_bytes);
    s.bytes = placer.bytes();
    return s;
  }

  /// The same places for a call with other sizes.
  constexpr LowLatencySlots with(const SlotSizes& call) const {
    LowLatencySlots s = *this;
    s.sizes = call;
    s.header_bytes = header_bytes_of(call);
    return s;
  }
  /// Everything before this offset is words and flags, to be set to the first epoch.
  constexpr std::uint64_t flag_bytes() const { return weights; }

  EXPERTWIRE_HOST_DEVICE std::uint64_t region(Epoch n, int peer) const {
    return static_cast<std::uint64_t>(slot_of(n)) * most.ranks + static_cast<std::uint64_t>(peer);
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t row_index(Epoch n, int peer, std::int64_t row) const {
    return region(n, peer) * most.max_tokens + static_cast<std::uint64_t>(row);
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t counts_of(Epoch n, int source) const {
    return counts + region(n, source) * counts_stride;
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t row_of(Epoch n, int source, std::int64_t row) const {
    return dispatch_rows + row_index(n, source, row) * dispatch_stride;
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t row_flag_of(Epoch n, int source, std::int64_t row) const {
    return row_flags + row_index(n, source, row) * sizeof(Epoch);
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t weights_of(Epoch n, int source, std::int64_t row) const {
    return weights + row_index(n, source, row) * most.top_k * sizeof(float);
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t weight_flag_of(Epoch n, int source) const {
    return weight_flags + region(n, source) * sizeof(Epoch);
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t partial_of(Epoch n, int expert_rank,
                                                  std::int64_t row) const {
    return partial_rows + row_index(n, expert_rank, row) * most.row_bytes;
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t partial_flag_of(Epoch n, int expert_rank,
                                                       std::int64_t row) const {
    return partial_flags + row_index(n, expert_rank, row) * sizeof(Epoch);
  }
};

/// What a rank tells every other at the start of a high-throughput combine.
struct CombineOffer {
  std::int32_t pull;     ///< its rows lie in its pool: read them there
  std::int32_t weights;  ///< it sends top-k weights home
};

/// A lane of the high-throughput mode.
///
/// Rows are announced by chunk: one flag for every `kChunkRows` rows of a (source, destination)
/// pair, so that flags cost nothing and a receiver still works while the sender does.
struct HighThroughputSlots {
  static constexpr std::uint64_t kChunkRows = 32;
  /// The counts of a source: its capacity, then rows to every rank, then selections per local
  /// expert.
  static constexpr int kCapacity = 0, kHeader = 1;

  SlotSizes most;   ///< the capacity
  SlotSizes sizes;  ///< of the call
  DirectionSlots dispatch, combine;
  std::uint64_t counts_stride = 0;
  std::uint64_t counts = 0;                           ///< [slot][source] Tagged [kHeader + R + L]
  std::uint64_t row_flags = 0;                        ///< [slot][source][chunk]
  std::uint64_t pool = 0;                             ///< [slot][pool_rows] payload
  std::uint64_t pool_tokens = 0;                      ///< [slot][pool_rows] int32
  std::uint64_t pool_experts = 0, pool_weights = 0;   ///< [slot][pool_rows][K] int32, float
  std::uint64_t pool_scales = 0;                      ///< [slot][pool_rows][scales]
  std::uint64_t offers = 0, offer_flags = 0;          ///< [slot][expert rank]
  std::uint64_t partial_rows = 0, partial_flags = 0;  ///< [slot][expert rank][M], [..][chunk]
  std::uint64_t partial_weights = 0;                  ///< [slot][expert rank][M][K]
  std::uint64_t bytes = 0;

  static constexpr HighThroughputSlots place(const SlotSizes& sizes) {
    HighThroughputSlots s;
    s.most = s.sizes = sizes;
    s.counts_stride = align_up((kHeader + sizes.ranks + sizes.local_experts) * sizeof(Tagged), 64);
    const std::uint64_t regions = kSlots * sizes.ranks, rows = regions * sizes.max_tokens;
    const std::uint64_t pool = kSlots * sizes.pool_rows;
    Placer placer;
    s.dispatch = DirectionSlots::place(placer, sizes.ranks);
    s.combine = DirectionSlots::place(placer, sizes.ranks);
    s.counts = placer.take(regions * s.counts_stride);
    s.row_flags = placer.take(regions * s.chunks() * sizeof(Epoch));
    s.offer_flags = placer.take(regions * sizeof(Epoch));
    s.partial_flags = placer.take(regions * s.chunks() * sizeof(Epoch));
    s.offers = placer.take(regions * sizeof(CombineOffer));
    s.pool_tokens = placer.take(pool * sizeof(std::int32_t));
    s.pool_experts = placer.take(pool * sizes.top_k * sizeof(std::int32_t));
    s.pool_weights = placer.take(pool * sizes.top_k * sizeof(float));
    s.pool_scales = placer.take(pool * sizes.scales * sizeof(float));
    s.partial_weights = placer.take(rows * sizes.top_k * sizeof(float));
    s.pool = placer.take(pool * sizes.row_bytes);
    s.partial_rows = placer.take(rows * sizes.row_bytes);
    s.bytes = placer.bytes();
    return s;
  }

  constexpr std::uint64_t flag_bytes() const { return offers; }
  /// The same places for a call with other sizes.
  constexpr HighThroughputSlots with(const SlotSizes& call) const {
    HighThroughputSlots s = *this;
    s.sizes = call;
    return s;
  }
  /// Chunks of one (source, destination) pair.
  EXPERTWIRE_HOST_DEVICE constexpr std::uint64_t chunks() const {
    return (most.max_tokens + kChunkRows - 1) / kChunkRows;
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t region(Epoch n, int peer) const {
    return static_cast<std::uint64_t>(slot_of(n)) * most.ranks + static_cast<std::uint64_t>(peer);
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t counts_of(Epoch n, int source) const {
    return counts + region(n, source) * counts_stride;
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t row_flag_of(Epoch n, int source, std::int64_t chunk) const {
    return row_flags +
           (region(n, source) * chunks() + static_cast<std::uint64_t>(chunk)) * sizeof(Epoch);
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t pool_index(Epoch n, std::int64_t row) const {
    return static_cast<std::uint64_t>(slot_of(n)) * most.pool_rows +
           static_cast<std::uint64_t>(row);
  }
  /// Rows lie side by side from the start of the slot, and so does what belongs to them.
  EXPERTWIRE_HOST_DEVICE std::uint64_t pool_row_of(Epoch n, std::int64_t row,
                                                   std::uint64_t data_bytes) const {
    return pool + pool_index(n, 0) * most.row_bytes + static_cast<std::uint64_t>(row) * data_bytes;
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t selection_of(Epoch n, std::int64_t row) const {
    return pool_index(n, 0) * most.top_k + static_cast<std::uint64_t>(row) * sizes.top_k;
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t pool_scales_of(Epoch n, std::int64_t row) const {
    return pool_scales +
           (pool_index(n, 0) * most.scales + static_cast<std::uint64_t>(row) * sizes.scales) *
               sizeof(float);
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t pool_token_of(Epoch n, std::int64_t row) const {
    return pool_tokens + pool_index(n, row) * sizeof(std::int32_t);
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t pool_experts_of(Epoch n, std::int64_t row) const {
    return pool_experts + selection_of(n, row) * sizeof(std::int32_t);
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t pool_weights_of(Epoch n, std::int64_t row) const {
    return pool_weights + selection_of(n, row) * sizeof(float);
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t offer_of(Epoch n, int expert_rank) const {
    return offers + region(n, expert_rank) * sizeof(CombineOffer);
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t offer_flag_of(Epoch n, int expert_rank) const {
    return offer_flags + region(n, expert_rank) * sizeof(Epoch);
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t partial_of(Epoch n, int expert_rank,
                                                  std::int64_t row) const {
    return partial_rows + region(n, expert_rank) * most.max_tokens * most.row_bytes +
           static_cast<std::uint64_t>(row) * sizes.row_bytes;
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t partial_weights_of(Epoch n, int expert_rank,
                                                          std::int64_t row) const {
    return partial_weights + (region(n, expert_rank) * most.max_tokens * most.top_k +
                              static_cast<std::uint64_t>(row) * sizes.top_k) *
                                 sizeof(float);
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t partial_flag_of(Epoch n, int expert_rank,
                                                       std::int64_t chunk) const {
    return partial_flags +
           (region(n, expert_rank) * chunks() + static_cast<std::uint64_t>(chunk)) * sizeof(Epoch);
  }
};

}  // namespace expertwire::ep
