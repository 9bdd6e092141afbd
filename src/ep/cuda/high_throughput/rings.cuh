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
/// The calling thread knows that the frame has been written.
__device__ __forceinline__ void announce(const Context& c, const RingSlots& ring, int peer,
                                         Epoch frame) {
  announce(c, peer, ring.arrived_of(frame), frame);
}
__device__ __forceinline__ bool has_come(const Context& c, const RingSlots& ring, int source,
                                         Epoch frame) {
  return arrived<KernelAccess>(inbox<Epoch>(c, source, ring.arrived_of(frame)), frame);
}
__device__ __forceinline__ const std::byte* frame_from(const Context& c, const RingSlots& ring,
                                                       int source, Epoch frame) {
  return inbox<std::byte>(c, source, ring.frame_of(frame));
}
/// The calling thread knows that the frame has been read.
__device__ __forceinline__ void give_back(const Context& c, const RingSlots& ring, int source,
                                          Epoch frame) {
  ep::grant<KernelAccess>(outbox<Epoch>(c, source, ring.taken_of(frame)), frame);
}

__device__ __forceinline__ RingWords* ring_words(const Context& c, const RingSlots& ring,
                                                 int peer) {
  return there<RingWords>(c, c.rank, ring.words_of(peer));
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
  std::uint32_t* tickets;  ///< [R - 1] rows given out of each ring; zero before the launch
};

/// The rings between this rank and all others, as one warp serves them: rows of a ring are given to
/// warps in their order, and a warp waits only if none of those that it has been given can move.
///
/// Warps are spread over the rings; with more warps than rings each begins with one ring, and goes
/// on to the next when all its rows have been given out, so that every ring has warps that wait for
/// no other. With fewer, a lane keeps each ring of a warp.
class Served {
 public:
  static_assert(kFewestReceivers * 32 >= kMostRanks);

  struct Row {
    int peer;
    int row;
  };

  /// `rows_of(peer)`: how many rows pass the ring to or from a rank.
  template <class RowsOf>
  __device__ __forceinline__ Served(const Context& c, const Servers& servers, RowsOf rows_of)
      : tickets_(servers.tickets), rank_(c.rank), rings_(c.size - 1) {
    const int groups = min(servers.warps, rings_), lane = static_cast<int>(threadIdx.x) % 32;
    alone_ = groups == rings_;
    ring_ = rings_ == 0 ? 0 : servers.warp % groups + (alone_ ? 0 : lane * groups);
    keeps_ = alone_ ? lane == 0 && rings_ > 0 : ring_ < rings_;
    tries_ = alone_ ? rings_ : 1;
    if (keeps_) take(rows_of);
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
      row_ = static_cast<int>(atomicAdd(tickets_ + ring_, 1U));
      if (row_ < rows_of(mine().peer)) return;
      if (--tries_ == 0) break;
      if (++ring_ == rings_) ring_ = 0;
    }
    keeps_ = false;
  }

  std::uint32_t* tickets_;
  int rank_, rings_;
  int ring_;  // that this lane keeps: of the rank so many behind this one
  int row_ = 0;
  int tries_;  // rings left to take from
  int last_ = 31;
  bool alone_, keeps_;
};

}  // namespace expertwire::ep::cuda
