#pragma once

// What dispatch and combine of the high-throughput mode share: a block's shared memory, and how the
// rows of a chunk are counted.

#include "ep/cuda/high_throughput/kernels.hpp"
#include "ep/cuda/high_throughput/rings.cuh"
#include "ep/cuda/kernel/call.cuh"
#include "ep/cuda/kernel/courier.cuh"

namespace expertwire::inline v0::ep::cuda {

inline constexpr int kChunk = static_cast<int>(HighThroughputSlots::kChunkRows);

/// The counts of a handle that every row needs, and stages of the warps behind them.
struct BlockShared {
  std::uint64_t full[kHighThroughputWarps][kMostStages];
  std::uint8_t held[kHighThroughputWarps][kMostStages];  // rows in a stage
  std::int32_t first_at[kMostRanks], capacity[kMostRanks];
  Epoch frames_to[kMostRanks], frames_from[kMostRanks];  // the first of this operation
  bool empty[kMostRanks];  // all frames of earlier operations have been read there
  bool overflow;
  std::int32_t needed;  ///< rows that came, or would have

  /// Where this rank's rows lie at `rank`, and those of `source` here.
  __device__ __forceinline__ Run run_at(int rank) const {
    return TokenMajor{capacity[rank]}.run(first_at[rank]);
  }
  __device__ __forceinline__ Run run_from(const Context& c, const HighThroughputRouting& routing,
                                          int source) const {
    return TokenMajor{capacity[c.rank]}.run(routing.first_from[source]);
  }
  /// How many rows this rank sends to `rank`, and gets from `source`; without room there, or here,
  /// they stay at home.
  __device__ __forceinline__ int rows_to(const HighThroughputRouting& routing, int rank) const {
    return static_cast<int>(
        run_at(rank).fitting(static_cast<std::uint32_t>(routing.rows_to[rank])));
  }
  __device__ __forceinline__ int rows_from(const Context& c, const HighThroughputRouting& routing,
                                           int source) const {
    return static_cast<int>(run_from(c, routing, source)
                                .fitting(static_cast<std::uint32_t>(routing.rows_from[source])));
  }
};

inline constexpr std::size_t kBlockSharedBytes = (sizeof(BlockShared) + 127) / 128 * 128;
static_assert(kBlockSharedBytes + kStagesBytes + 320 <= 227 * 1024,
              "shared memory of a Hopper block");

inline std::size_t shared_bytes(bool bulk) { return kBlockSharedBytes + (bulk ? kStagesBytes : 0); }

/// `other` is the direction that this operation is not of. To be followed by a barrier.
__device__ __forceinline__ void take_routing(const Context& c, const HighThroughputRouting& routing,
                                             const RingSlots& ring, const Peeked& peeked,
                                             const Direction<KernelAccess>& other, BlockShared& s) {
  // A rank that has read all operations before this one has read all frames before this one's.
  const auto peer = static_cast<int>(threadIdx.x);
  if (peer < c.size)
    s.empty[peer] =
        reached(peeked.credit, peeked.send - 1) && other.has_read(peer, other.sending() - 1);
  for (int rank = threadIdx.x; rank < c.size; rank += blockDim.x) {
    s.first_at[rank] = routing.first_at[rank];
    s.capacity[rank] = routing.capacity[rank];
    const RingWords last = *ring_words(c, ring, rank);
    s.frames_to[rank] = last.written + 1;
    s.frames_from[rank] = last.read + 1;
  }
  if (threadIdx.x == 0) s.overflow = *routing.overflow != 0;
  if (threadIdx.x == 32) s.needed = *routing.needed;
}

/// The stages of `warp`, with room for `parts` pieces a stage.
__device__ __forceinline__ Stages stages_of(BlockShared& s, const Moving& moving, int warp,
                                            int parts) {
  Stages stages;
  stages.count = moving.stages;
  stages.stage_bytes = moving.piece_bytes * static_cast<std::uint32_t>(parts);
  stages.full = s.full[warp];
  stages.memory = reinterpret_cast<std::byte*>(&s) + kBlockSharedBytes +
                  static_cast<std::size_t>(warp) * moving.stages_bytes;
  if (has_bulk_copies() && moving.bulk) {
    if (threadIdx.x % 32 == 0) stages.init();
    __syncwarp();
  }
  return stages;
}

__device__ __forceinline__ std::uint64_t offset_of(const Moving& moving, const Cursor& at) {
  return static_cast<std::uint64_t>(at.piece) * moving.piece_bytes;
}
__device__ __forceinline__ std::uint32_t bytes_of(const Moving& moving, std::uint32_t row_bytes,
                                                  const Cursor& at) {
  return min(row_bytes - static_cast<std::uint32_t>(at.piece) * moving.piece_bytes,
             moving.piece_bytes);
}
__device__ __forceinline__ Piece piece_of(const Moving& moving, const std::byte* row,
                                          std::uint32_t row_bytes, const Cursor& at) {
  return {row + offset_of(moving, at), bytes_of(moving, row_bytes, at)};
}

/// Rows that the warps of all blocks share out among themselves while they work: SMs do not all get
/// the same part of the wire. A ticket is a batch of rows side by side. Batches become smaller
/// towards the end, half of an equal share at first; where rows are awaited all are small, so that
/// they come in order.
struct Sharing {
  std::uint32_t* ticket;  ///< of this launch; zero before it
  int rows;
  int warps;
  bool awaited;
  int first = -1;  ///< this warp's first ticket, if all warps take one at once
};

class SharedRows {
 public:
  __device__ __forceinline__ explicit SharedRows(const Sharing& sharing) : sharing_(sharing) {
    if (lane() == 0)
      ticket_ = sharing.first >= 0 ? static_cast<unsigned>(sharing.first) : next_ticket();
  }
  /// Whether this warp has an `i`-th row; asked once for each, in order. All lanes call.
  __device__ __forceinline__ bool take(int i) {
    if (next_ == end_) open_batch();
    if (next_ >= end_) return false;
    const int row = next_++;
    if (lane() == i % 32) {
      held_ = row;
      closes_ = next_ == end_;
    }
    // The next ticket is on its way while the last row of a batch is.
    if (next_ == end_ && lane() == 0) ticket_ = next_ticket();
    return true;
  }
  /// The `i`-th row; of the last 32 that were taken.
  __device__ __forceinline__ int at(int i) const { return __shfl_sync(kAllLanes, held_, i % 32); }
  /// Whether it is the last of its batch.
  __device__ __forceinline__ bool closes(int i) const {
    return __shfl_sync(kAllLanes, closes_ ? 1 : 0, i % 32) != 0;
  }

 private:
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ __forceinline__ unsigned next_ticket() const {
    return atomicAdd(sharing_.ticket, 1U) +
           static_cast<unsigned>(sharing_.first >= 0 ? sharing_.warps : 0);
  }
  __device__ __forceinline__ void open_batch() {
    constexpr int kAwaited = 2;  // rows of a batch
    const auto ticket = static_cast<int>(__shfl_sync(kAllLanes, ticket_, 0));
    std::int64_t begin = 0;
    int size = kAwaited;
    if (sharing_.awaited) {
      begin = static_cast<std::int64_t>(ticket) * size;
    } else {
      int rest = (sharing_.rows + sharing_.warps - 1) / sharing_.warps;  // of a warp
      size = max((rest + 1) / 2, 1);
      for (int round = ticket / sharing_.warps; round > 0 && begin < sharing_.rows; --round) {
        begin += static_cast<std::int64_t>(sharing_.warps) * size;
        rest -= size;
        size = max((rest + 1) / 2, 1);
      }
      begin += static_cast<std::int64_t>(ticket % sharing_.warps) * size;
    }
    next_ = static_cast<int>(min(begin, static_cast<std::int64_t>(sharing_.rows)));
    end_ = min(next_ + size, sharing_.rows);
  }

  Sharing sharing_;
  unsigned ticket_ = 0;     // lane 0: of the batch to come
  int next_ = 0, end_ = 0;  // of this batch
  int held_ = 0;            // lane i % 32: the i-th row
  bool closes_ = false;
};

/// The last block of a launch makes the tickets ready for the next.
__device__ __forceinline__ void return_tickets(std::uint32_t* tickets) {
  if (threadIdx.x < kTickets) tickets[threadIdx.x] = 0;
}

/// Whether a row to `peer` may be written before the reader has given its frame back: in a ring
/// that was empty at the start all frames are free once.
__device__ __forceinline__ bool is_free(const BlockShared& s, const RingSlots& ring, int peer,
                                        std::uint32_t row) {
  return s.empty[peer] && row < ring.frames;
}

/// So many frames have passed to and from `peer` in this operation; a thread of the last block.
__device__ __forceinline__ void advance(const Context& c, const RingSlots& ring,
                                        const BlockShared& s, int peer, int to, int from) {
  *ring_words(c, ring, peer) = {s.frames_to[peer] - 1 + static_cast<Epoch>(to),
                                s.frames_from[peer] - 1 + static_cast<Epoch>(from)};
}

/// The same calls for rows that a warp owns from the start: every `step`-th, so that all warps work
/// side by side.
struct OwnRows {
  int first, step, rows;

  __device__ __forceinline__ bool take(int i) const { return at(i) < rows; }
  __device__ __forceinline__ int at(int i) const { return first + i * step; }
  __device__ __forceinline__ bool closes(int) const { return true; }
};

/// Counts the pieces that a warp has written to each chunk; lane r % 32 keeps rank r. A count is an
/// acq_rel addition behind everything that the warp wrote, which is slow while the wire is busy, so
/// where nobody waits there is one for each chunk that a warp has been in.
class ChunkTally {
 public:
  /// Adds one piece of each lane's landing; all lanes call. `close(rank, chunk, pieces)` is called
  /// by the lane that keeps `rank` when the warp has left a chunk.
  template <class Close>
  __device__ __forceinline__ void add(const Landing& landing, int width, Close close) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int i = 0; i < width; ++i) {
      const int rank = __shfl_sync(kAllLanes, landing.rank, i);
      const int chunk = __shfl_sync(kAllLanes, landing.row, i) / kChunk;
      if (rank < 0 || rank % 32 != lane) continue;
#pragma unroll
      for (int m = 0; m < kRanksOfLane; ++m) {
        const bool mine = m == rank / 32;
        if (mine && pieces_[m] > 0 && chunk_[m] != chunk) {
          close(rank, chunk_[m], pieces_[m]);
          pieces_[m] = 0;
        }
        chunk_[m] = mine ? chunk : chunk_[m];
        pieces_[m] += mine ? 1 : 0;
      }
    }
  }
  template <class Close>
  __device__ __forceinline__ void close_all(Close close) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int m = 0; m < kRanksOfLane; ++m)
      if (pieces_[m] > 0) {
        close(m * 32 + lane, chunk_[m], pieces_[m]);
        pieces_[m] = 0;
      }
  }

 private:
  static constexpr int kRanksOfLane = kMostRanks / 32;
  int chunk_[kRanksOfLane] = {};
  std::uint32_t pieces_[kRanksOfLane] = {};
};

/// Counts pieces of a chunk of a pair with `rows` rows, and announces the chunk when its last piece
/// is there. What other warps counted before is covered by the release.
__device__ __forceinline__ void count_pieces(std::uint32_t* counter, Epoch* flag, int chunk,
                                             std::uint32_t pieces, int rows, int pieces_of_row,
                                             Epoch n) {
  const auto whole = static_cast<std::uint32_t>(min(kChunk, rows - chunk * kChunk) * pieces_of_row);
  if (KernelAccess::add(counter, pieces) + pieces != whole) return;
  KernelAccess::store(counter, 0);
  publish<KernelAccess>(flag, n);
}

}  // namespace expertwire::ep::cuda
