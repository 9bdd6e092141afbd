#pragma once

// Rings in kernels: their frames, and how a warp serves them. See ep/protocol/ring.hpp.

#include "ep/cuda/high_throughput/pipeline.cuh"
#include "ep/cuda/kernel/entry.cuh"
#include "ep/protocol/ring.hpp"

namespace expertwire::inline v0::ep::cuda {

// Frames -----------------------------------------------------------------------------------------

__device__ __forceinline__ bool has_room(const Context& c, const RingSlots& ring, int peer,
                                         Epoch frame) {
  return ep::has_room<KernelAccess>(inbox<Epoch>(c, peer, ring.taken_of(frame)), frame,
                                    ring.frames);
}
__device__ __forceinline__ std::byte* frame_to(const Context& c, const RingSlots& ring, int peer,
                                               Epoch frame) {
  return outbox<std::byte>(c, peer, ring.frame_of(frame));
}
__device__ __forceinline__ bool has_come(const Context& c, const RingSlots& ring, int source,
                                         Epoch frame) {
  return arrived<KernelAccess>(inbox<Epoch>(c, source, ring.arrived_of(frame)), frame);
}
__device__ __forceinline__ const std::byte* frame_from(const Context& c, const RingSlots& ring,
                                                       int source, Epoch frame) {
  return rows_from<std::byte>(c, source, ring.frame_of(frame));
}
__device__ __forceinline__ RingWords* ring_words(const Context& c, const RingSlots& ring,
                                                 int peer) {
  return there<RingWords>(c, c.rank, ring.words_of(peer));
}

// Giving back ------------------------------------------------------------------------------------

/// A frame that a thread has read and not given back: it is once the warp has the next, behind its
/// proxy fence, which would wait for the store; or before it must wait.
class Owed {
 public:
  __device__ __forceinline__ void set(int peer, Epoch frame) {
    peer_ = peer;
    frame_ = frame;
  }
  __device__ __forceinline__ void give_back(const Context& c, const RingSlots& ring) {
    if (peer_ >= 0)
      ep::give_back<KernelAccess>(outbox<Epoch>(c, peer_, ring.taken_of(frame_)), frame_);
    peer_ = -1;
  }

 private:
  int peer_ = -1;
  Epoch frame_ = 0;
};

// Announcing -------------------------------------------------------------------------------------

/// Blocks that write to rings. With many, the last one has nothing on the wire, so that its
/// announcer need not wait for that.
__device__ __forceinline__ int writing_blocks(const Context& c) {
  constexpr int kMany = 16;
  const int blocks = workers(c);
  return blocks >= kMany ? blocks - 1 : blocks;
}
__device__ __forceinline__ bool is_last_block(const Context& c) {
  return static_cast<int>(blockIdx.x) == workers(c) - 1;
}

/// What warps have written and not announced, in device memory of this rank. A release at system
/// scope waits until all that its SM has on the wire has arrived, and holds up the SM meanwhile; so
/// warps release what they have written to this GPU alone, by a place in a queue, and one warp of
/// the grid announces it to the other ranks, many frames behind one release.
struct FrameQueue {
  std::uint32_t tail, head;  ///< places given out, and announced; they run on for ever

  __device__ std::uint64_t* items() { return reinterpret_cast<std::uint64_t*>(this + 1); }
};

/// Of which the kernels know so many places, a power of two.
struct FrameQueueRef {
  FrameQueue* queue;
  std::uint32_t places;
};

/// A row of a ring, as it is queued.
struct QueuedRow {
  static constexpr std::uint32_t kNone = UINT32_MAX;
  static constexpr int kRowBits = 24;
  static_assert(kMostRanks < 1 << (32 - kRowBits));

  std::uint32_t word = kNone;

  __device__ static QueuedRow of(int peer, int row) {
    return {static_cast<std::uint32_t>(peer) << kRowBits | static_cast<std::uint32_t>(row)};
  }
  __device__ bool present() const { return word != kNone; }
  /// Tells the reader that its frame is there; `first`: those of the operation, by peer.
  __device__ __forceinline__ void tell(const Context& c, const RingSlots& ring,
                                       const Epoch* first) const {
    const auto peer = static_cast<int>(word >> kRowBits);
    const Epoch frame = first[peer] + (word & ((1U << kRowBits) - 1));
    KernelAccess::store(outbox<Epoch>(c, peer, ring.arrived_of(frame)), frame);
  }
};

/// What a warp has written and not queued: a lane has up to two frames, which are queued together.
/// If each warp has a row or so (`direct`), it announces by itself what it has written: that takes
/// less time, and there is little on the wire.
class Written {
 public:
  __device__ __forceinline__ Written(FrameQueue* queue, std::uint32_t places, bool direct)
      : queue_(queue), mask_(places - 1), direct_(direct) {}

  /// A frame that this lane has written, or none (peer -1); all lanes call. True when it is time to
  /// post().
  __device__ __forceinline__ bool add(int peer, int row) {
    second_ = first_;
    first_ = peer < 0 ? QueuedRow() : QueuedRow::of(peer, row);
    return ++added_ == 2;
  }
  /// Queues or announces what the lanes have added.
  __device__ __forceinline__ void post(const Context& c, const RingSlots& ring,
                                       const Epoch* first_frames) {
    added_ = 0;
    const unsigned first = __ballot_sync(kAllLanes, first_.present());
    const unsigned second = __ballot_sync(kAllLanes, second_.present());
    if ((first | second) == 0) return;
    if (direct_) {
      device::fence_system();
      if (first_.present()) first_.tell(c, ring, first_frames);
      if (second_.present()) second_.tell(c, ring, first_frames);
    } else {
      const int lane = static_cast<int>(threadIdx.x) % 32;
      std::uint32_t place = 0;
      if (lane == 0)
        place = atomicAdd(&queue_->tail, static_cast<unsigned>(__popc(first) + __popc(second)));
      place = __shfl_sync(kAllLanes, place, 0);
      device::fence_gpu();
      const unsigned before = (1U << lane) - 1;
      if (first_.present()) queue(place + __popc(first & before), first_);
      if (second_.present()) queue(place + __popc(first) + __popc(second & before), second_);
    }
    first_ = second_ = {};
  }

 private:
  /// With the number of its place, which no older item of that place has.
  __device__ __forceinline__ void queue(std::uint32_t place, const QueuedRow& row) const {
    device::store_relaxed_system(queue_->items() + (place & mask_),
                                 static_cast<std::uint64_t>(place + 1) << 32 | row.word);
  }

  FrameQueue* queue_;
  std::uint32_t mask_;
  bool direct_;
  QueuedRow first_, second_;
  int added_ = 0;
};

/// Announces so many frames in the order in which they are queued; one warp. Ends early when the
/// object has failed.
__device__ __forceinline__ void announce_frames(const Context& c, const RingSlots& ring,
                                                const FrameQueueRef& from, int frames,
                                                const Epoch* first_frames) {
  constexpr int kAtOnce = 4, kPollsPerLook = 64;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  std::uint32_t head = from.queue->head;
  int polls = 0;
#pragma unroll 1
  while (frames > 0) {
    std::uint64_t words[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      words[i] = device::load_relaxed_system(from.queue->items() +
                                             ((head + i * 32 + lane) & (from.places - 1)));
    int ready = 0;  // side by side from the head on
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const std::uint32_t place = head + static_cast<std::uint32_t>(i * 32 + lane);
      const unsigned there =
          __ballot_sync(kAllLanes, static_cast<std::uint32_t>(words[i] >> 32) == place + 1);
      if (ready == i * 32) ready += there == kAllLanes ? 32 : __ffs(static_cast<int>(~there)) - 1;
    }
    if (ready == 0) {
      if (++polls % kPollsPerLook == 0 && device::load_relaxed_system(&c.words->failed) != 0)
        return;
      continue;
    }
    device::fence_system();  // acquires what was queued, and releases it
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (i * 32 + lane < ready)
        QueuedRow{static_cast<std::uint32_t>(words[i])}.tell(c, ring, first_frames);
    head += static_cast<std::uint32_t>(ready);
    frames -= ready;
  }
  if (lane == 0) from.queue->head = head;
}

// Serving ----------------------------------------------------------------------------------------

/// wait_until() for a whole warp: all lanes ask, until one of them is answered. Returns the lanes
/// that were, or none if the wait was given up.
template <class Ready>
__device__ __forceinline__ unsigned wait_for_any(const Context& context, int peer, Phase phase,
                                                 std::uint64_t detail, Ready ready) {
  constexpr int kPolls = 16;
  Patience patience;
  const bool first = threadIdx.x % 32 == 0;
#pragma unroll 1
  for (bool last = false;;) {
#pragma unroll 1
    for (int i = 0; i < kPolls; ++i)
      if (const unsigned lanes = __ballot_sync(kAllLanes, ready())) return lanes;
    if (last) {
      if (first) patience.report(context, peer, phase, detail);
      return 0;
    }
    const int mine = first ? patience.judge(context, peer) : Patience::kGoOn;
    const int verdict = __shfl_sync(kAllLanes, mine, 0);
    if (verdict == Patience::kGiveUp) return 0;
    last = verdict == Patience::kLastLook;
  }
}

/// Which warps of a grid serve rings.
struct Servers {
  int warp, warps;
  /// [R - 1] rows given out of each ring, but for the first of each warp; zero before the launch.
  std::uint32_t* tickets;
};

/// The rings between this rank and all others, as one warp serves them: rows of a ring are given to
/// warps in their order, and a warp waits only if none of those that it has been given can move.
///
/// Warps are spread over the rings; with more warps than rings each begins with one ring, and goes
/// on to the next when all its rows have been given out, so that every ring has warps that wait for
/// no other. With fewer, a lane keeps each ring of a warp.
class Served {
 public:
  static_assert((kFewestReceivers - 1) * 32 >= kMostRanks);

  struct Row {
    int peer;
    int row;
  };

  /// `rows_of(peer)`: how many rows pass the ring to or from a rank.
  template <class RowsOf>
  __device__ __forceinline__ Served(const Context& c, const Servers& servers, RowsOf rows_of)
      : tickets_(servers.tickets), rank_(c.rank), rings_(c.size - 1) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (rings_ == 0) return;
    warps_ = max(servers.warps, rings_);  // as if a lane that keeps a ring were one
    const bool alone = servers.warps >= rings_;
    ring_ = alone ? servers.warp % rings_ : servers.warp + lane * servers.warps;
    keeps_ = alone ? lane == 0 : ring_ < rings_;
    tries_ = alone ? rings_ : 1;
    row_ = alone ? servers.warp / rings_ : 0;  // no ticket for the first: all take it at once
    if (keeps_ && row_ >= rows_of(mine().peer)) take(rows_of);
  }

  /// The next row that `can_move(row)`, which the lane asks that keeps it. All lanes call; with
  /// `wait` it is not `not_yet`. `good` becomes false if a wait was given up.
  template <class RowsOf, class CanMove>
  __device__ __forceinline__ Answer next(const Context& c, Phase phase, bool wait, RowsOf rows_of,
                                         CanMove can_move, Row* found, bool* good) {
    const unsigned kept = __ballot_sync(kAllLanes, keeps_);
    if (kept == 0 || !*good) return Answer::end;
    const auto ready = [&] { return keeps_ && can_move(mine()); };
    unsigned lanes = __ballot_sync(kAllLanes, ready());
    if (lanes == 0) {
      if (!wait) return Answer::not_yet;
      const int one = __ffs(static_cast<int>(kept)) - 1;
      const int peer = __shfl_sync(kAllLanes, mine().peer, one);
      const int row = __shfl_sync(kAllLanes, row_, one);
      lanes = wait_for_any(c, peer, phase, static_cast<std::uint64_t>(row), ready);
      *good = lanes != 0;
      if (!*good) return Answer::end;
    }
    __syncwarp();  // what one lane acquired, all may use
    const unsigned later = lanes & ~((2U << last_) - 1);
    last_ = __ffs(static_cast<int>(later != 0 ? later : lanes)) - 1;
    *found = {__shfl_sync(kAllLanes, mine().peer, last_), __shfl_sync(kAllLanes, row_, last_)};
    if (static_cast<int>(threadIdx.x) % 32 == last_) take(rows_of);
    return Answer::row;
  }

 private:
  __device__ __forceinline__ Row mine() const {
    const int peer = rank_ + 1 + ring_;
    return {peer <= rings_ ? peer : peer - rings_ - 1, row_};
  }
  /// Takes this lane's next row, of its ring or of the next that has one.
  template <class RowsOf>
  __device__ __forceinline__ void take(RowsOf rows_of) {
#pragma unroll 1
    for (;;) {
      const int first = (warps_ - ring_ + rings_ - 1) / rings_;  // rows of those that begin here
      row_ = first + static_cast<int>(atomicAdd(tickets_ + ring_, 1U));
      if (row_ < rows_of(mine().peer)) return;
      if (--tries_ == 0) break;
      if (++ring_ == rings_) ring_ = 0;
    }
    keeps_ = false;
  }

  std::uint32_t* tickets_;
  int rank_, rings_;
  int warps_ = 0;
  int ring_ = 0;  // that this lane keeps: of the rank so many behind this one
  int row_ = 0;
  int tries_ = 0;  // rings left to take from
  int last_ = 31;
  bool keeps_ = false;
};

}  // namespace expertwire::ep::cuda
