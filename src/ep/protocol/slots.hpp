#pragma once

// Where things lie in a pair of each mode, and in the pools beside the pairs. Shared by host and
// device.
//
// An object is made for the most that it may meet (its capacity), and every call brings sizes of
// its own. Places follow from the capacity, so that no payload of any call ever covers a word of
// another, which could hold the epoch that is waited for. What lies at a place follows from the
// call.

#include "ep/protocol/pair.hpp"
#include "ep/protocol/ring.hpp"

namespace expertwire::inline v0::ep {

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

/// A lane of the low-latency mode. Offsets are of a pair.
struct LowLatencySlots {
  /// The counts of a source: how many rows, then selections per local expert.
  static constexpr int kRows = 0, kHeader = 1;

  SlotSizes most;   ///< the capacity
  SlotSizes sizes;  ///< of the call
  Pairs pairs;
  DirectionSlots dispatch, combine;
  std::uint64_t header_bytes = 0;     ///< RowHeader and K selections, of the call
  std::uint64_t dispatch_stride = 0;  ///< from row to row
  std::uint64_t counts_stride = 0;
  std::uint64_t counts = 0;                           ///< [slot] Tagged [kHeader + L]
  std::uint64_t dispatch_rows = 0, row_flags = 0;     ///< [slot][M]
  std::uint64_t weights = 0;                          ///< [slot][M][K]; combine's flag says so
  std::uint64_t partial_rows = 0, partial_flags = 0;  ///< [slot][M]
  std::uint64_t bytes = 0;                            ///< of a lane

  EXPERTWIRE_HOST_DEVICE static constexpr std::uint64_t header_bytes_of(const SlotSizes& sizes) {
    return align_up(sizeof(RowHeader) + sizes.top_k * sizeof(Selection), 64);
  }
  static constexpr LowLatencySlots place(const SlotSizes& sizes) {
    LowLatencySlots s;
    s.most = s.sizes = sizes;
    s.header_bytes = header_bytes_of(sizes);
    s.dispatch_stride = s.header_bytes + align_up(sizes.row_bytes, 64);
    s.counts_stride = align_up((kHeader + sizes.local_experts) * sizeof(Tagged), 64);
    const std::uint64_t rows = kSlots * sizes.max_tokens;
    Placer own, pair;
    s.dispatch = DirectionSlots::place(own, pair, kSlots * s.counts_stride);
    s.counts = s.dispatch.behind_headers();
    s.row_flags = pair.take(rows * sizeof(Epoch));
    s.dispatch.rows = {s.row_flags, pair.bytes()};
    s.combine = DirectionSlots::place(own, pair, 0);
    s.partial_flags = pair.take(rows * sizeof(Epoch));
    s.combine.rows = {s.partial_flags, pair.bytes()};
    s.pairs.word_bytes = pair.bytes();
    s.weights = pair.take(rows * sizes.top_k * sizeof(float));
    s.dispatch_rows = pair.take(rows * s.dispatch_stride);
    s.partial_rows = pair.take(rows * sizes.row_bytes);
    s.pairs.first = own.bytes();
    s.pairs.bytes = pair.bytes();
    s.bytes = s.pairs.of(static_cast<int>(sizes.ranks));
    return s;
  }

  /// The same places for a call with other sizes.
  constexpr LowLatencySlots with(const SlotSizes& call) const {
    LowLatencySlots s = *this;
    s.sizes = call;
    s.header_bytes = header_bytes_of(call);
    return s;
  }

  EXPERTWIRE_HOST_DEVICE std::uint64_t row_index(Epoch n, std::int64_t row) const {
    return static_cast<std::uint64_t>(slot_of(n)) * most.max_tokens +
           static_cast<std::uint64_t>(row);
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t counts_of(Epoch n) const {
    return counts + static_cast<std::uint64_t>(slot_of(n)) * counts_stride;
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t row_of(Epoch n, std::int64_t row) const {
    return dispatch_rows + row_index(n, row) * dispatch_stride;
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t row_flag_of(Epoch n, std::int64_t row) const {
    return row_flags + row_index(n, row) * sizeof(Epoch);
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t weights_of(Epoch n, std::int64_t row) const {
    return weights + row_index(n, row) * most.top_k * sizeof(float);
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t partial_of(Epoch n, std::int64_t row) const {
    return partial_rows + row_index(n, row) * most.row_bytes;
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t partial_flag_of(Epoch n, std::int64_t row) const {
    return partial_flags + row_index(n, row) * sizeof(Epoch);
  }
};

/// What a rank tells every other at the start of a high-throughput combine.
struct CombineOffer {
  std::int32_t pull;     ///< its rows lie in its pool: read them there
  std::int32_t weights;  ///< it sends top-k weights home
};

/// A row of high throughput and what goes beside it; offsets of a frame.
struct FrameParts {
  std::uint64_t token = 0;      ///< int32
  std::uint64_t experts = 0;    ///< int32 [K]
  std::uint64_t weights = 0;    ///< float [K]
  std::uint64_t positions = 0;  ///< int32 [K], where rows are grouped by expert
  std::uint64_t scales = 0;     ///< [scales]
  std::uint64_t bytes = 0;      ///< of all of it, behind the row itself
};

/// A lane of the high-throughput mode. Offsets are of a pair, those of the pool of the lane: a row
/// of a pool can come from any rank.
///
/// Rows reach outputs of the caller's through rings, and rows of a combine come home through them
/// (see ring.hpp). A pool exists if it has been asked for. Its rows are written to their final
/// places and announced by chunk: one flag for every `kChunkRows` rows of a (source, destination)
/// pair, so that flags cost nothing and a receiver still works while the sender does.
struct HighThroughputSlots {
  static constexpr std::uint64_t kChunkRows = 32;
  /// What the rings of an object to other ranks take at most, over all lanes, unless two frames a
  /// ring are more: less than half of
  /// the L2 of an A100 (40 MB), H100 (50 MB) or later.
  static constexpr std::uint64_t kRingBytes = 16 << 20;
  /// The counts of a source: its capacity, then rows to every rank, then selections per local
  /// expert.
  static constexpr int kCapacity = 0, kHeader = 1;

  SlotSizes most;   ///< the capacity
  SlotSizes sizes;  ///< of the call
  Pairs pairs;
  DirectionSlots dispatch, combine;
  RingSlots ring;                   ///< of both directions, whose operations take turns
  FrameParts dispatched, combined;  ///< of its frames
  std::uint64_t counts_stride = 0;
  std::uint64_t counts = 0;                          ///< [slot] Tagged [kHeader + R + L]
  std::uint64_t row_flags = 0;                       ///< [slot][chunk], of the pool
  std::uint64_t offers = 0;                          ///< [slot]; combine's flag says so
  std::uint64_t pool = 0;                            ///< [slot][pool_rows] payload
  std::uint64_t pool_tokens = 0;                     ///< [slot][pool_rows] int32
  std::uint64_t pool_experts = 0, pool_weights = 0;  ///< [slot][pool_rows][K] int32, float
  std::uint64_t pool_scales = 0;                     ///< [slot][pool_rows][scales]
  std::uint64_t bytes = 0;                           ///< of a lane

  static constexpr FrameParts parts_of_dispatch(const SlotSizes& sizes) {
    constexpr std::uint64_t kWord = 4, kVector = 16;
    FrameParts parts;
    parts.token = align_up(sizes.row_bytes, kVector);
    parts.experts = parts.token + kVector;
    parts.weights = parts.experts + sizes.top_k * kWord;
    parts.positions = parts.weights + sizes.top_k * kWord;
    parts.scales = parts.positions + sizes.top_k * kWord;
    parts.bytes = parts.scales + sizes.scales * kWord;
    return parts;
  }
  static constexpr FrameParts parts_of_combine(const SlotSizes& sizes) {
    constexpr std::uint64_t kWord = 4, kVector = 16;
    FrameParts parts;
    parts.weights = align_up(sizes.row_bytes, kVector);
    parts.bytes = parts.weights + sizes.top_k * kWord;
    return parts;
  }
  static constexpr std::uint64_t frame_bytes(const SlotSizes& sizes) {
    const std::uint64_t there = parts_of_dispatch(sizes).bytes,
                        home = parts_of_combine(sizes).bytes;
    return there > home ? there : home;
  }
  /// Frames of a ring of an object with `lanes` lanes: as many as there is room for, or tokens.
  static constexpr std::uint32_t frames_for(const SlotSizes& sizes, int lanes) {
    const std::uint64_t rings = (sizes.ranks > 1 ? sizes.ranks - 1 : 1);
    std::uint32_t frames = frames_within(kRingBytes, rings * static_cast<std::uint64_t>(lanes),
                                         align_up(frame_bytes(sizes), kAlignment));
    while (frames > 2 && frames / 2 >= sizes.max_tokens) frames /= 2;
    return frames;
  }

  /// Without rows of a pool there is none; `frames` are those of a ring.
  static constexpr HighThroughputSlots place(const SlotSizes& sizes, std::uint32_t frames) {
    HighThroughputSlots s;
    s.most = s.sizes = sizes;
    s.dispatched = parts_of_dispatch(sizes);
    s.combined = parts_of_combine(sizes);
    s.counts_stride = align_up((kHeader + sizes.ranks + sizes.local_experts) * sizeof(Tagged), 64);
    Placer own, pair;
    s.dispatch = DirectionSlots::place(own, pair, kSlots * s.counts_stride);
    s.counts = s.dispatch.behind_headers();
    s.combine = DirectionSlots::place(own, pair, kSlots * sizeof(CombineOffer));
    s.offers = s.combine.behind_headers();
    const std::uint64_t begin = pair.bytes();
    s.ring = RingSlots::place(own, pair, sizes.ranks, frames);
    s.dispatch.rows = s.combine.rows = {begin, pair.bytes()};
    s.row_flags = pair.take(kSlots * s.chunks() * sizeof(Epoch));
    s.pairs.word_bytes = pair.bytes();
    s.ring.place_rows(pair, frame_bytes(sizes));
    s.pairs.first = own.bytes();
    s.pairs.bytes = pair.bytes();
    s.place_pool();
    return s;
  }

  /// The same places for a call with other sizes.
  constexpr HighThroughputSlots with(const SlotSizes& call) const {
    HighThroughputSlots s = *this;
    s.sizes = call;
    return s;
  }
  /// Chunks of one (source, destination) pair.
  EXPERTWIRE_HOST_DEVICE constexpr std::uint64_t chunks() const {
    return most.pool_rows == 0 ? 0 : (most.max_tokens + kChunkRows - 1) / kChunkRows;
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t counts_of(Epoch n) const {
    return counts + static_cast<std::uint64_t>(slot_of(n)) * counts_stride;
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t row_flag_of(Epoch n, std::int64_t chunk) const {
    return row_flags +
           (static_cast<std::uint64_t>(slot_of(n)) * chunks() + static_cast<std::uint64_t>(chunk)) *
               sizeof(Epoch);
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
  EXPERTWIRE_HOST_DEVICE std::uint64_t offer_of(Epoch n) const {
    return offers + static_cast<std::uint64_t>(slot_of(n)) * sizeof(CombineOffer);
  }

 private:
  /// Beside the pairs.
  constexpr void place_pool() {
    const std::uint64_t rows = kSlots * most.pool_rows;
    Placer lane;
    lane.take(pairs.of(static_cast<int>(most.ranks)));
    pool_tokens = lane.take(rows * sizeof(std::int32_t));
    pool_experts = lane.take(rows * most.top_k * sizeof(std::int32_t));
    pool_weights = lane.take(rows * most.top_k * sizeof(float));
    pool_scales = lane.take(rows * most.scales * sizeof(float));
    pool = lane.take(rows * most.row_bytes);
    bytes = lane.bytes();
  }
};

}  // namespace expertwire::ep
