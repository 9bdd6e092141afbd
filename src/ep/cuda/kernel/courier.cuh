#pragma once

// The courier: a block behind those that work, in every launch of an object with staged peers.
//
// What a staged peer tells, grants and announces comes to host memory. Kernels do not wait there:
// one host word serves one load a microsecond, and a load that is outstanding holds up the releases
// and fences of its SM. So the courier alone reads the words of the launch's direction there, a few
// lines at once, and stores what has changed to the same places in this rank's own memory, where
// everybody waits whatever the path. It has an SM of its own, so that it holds up nobody, and
// leaves when all others of the launch have. What comes between launches stays where it is until
// the next courier carries it.
//
// Order. Flags of rows are carried at once: rows stay in host memory, and the fence between load
// and store makes them visible to whoever acquires the flag. Control words promise that all that
// was told before is there. So they are stored one round later, when the told words, loaded after
// them, have been stored.

#include "ep/cuda/kernel/entry.cuh"

namespace expertwire::inline v0::ep::cuda {

/// The staged peers, in shared memory of the block.
struct StagedPeers {
  std::uint8_t ranks[kMostRanks];
  static_assert(kMostRanks <= 256);
  std::int32_t count;
};

/// A piece of the words that a staged peer writes: where it comes to, and where it is waited for.
struct CarriedWords {
  const device::Words* there;
  device::Words* here;

  __device__ static CarriedWords of(const Context& c, int peer, std::uint64_t offset) {
    return {rows_from<device::Words>(c, peer, offset),
            const_cast<device::Words*>(inbox<device::Words>(c, peer, offset))};
  }
};

__device__ __forceinline__ bool differ(const device::Words& a, const device::Words& b) {
  return a.low != b.low || a.high != b.high;
}

/// The words that are carried whenever they change: what is told, and flags of rows.
struct Route {
  Stretch told, rows;

  __device__ int pieces() const {
    return static_cast<int>((told.end - told.begin + rows.end - rows.begin) /
                            sizeof(device::Words));
  }
  __device__ std::uint64_t offset_of(int piece) const {
    const std::uint64_t at = told.begin + static_cast<std::uint64_t>(piece) * sizeof(device::Words);
    return at < told.end ? at : rows.begin + (at - told.end);
  }
};

/// Carries what has changed at every staged peer; all threads. All loads come before all fences: a
/// fence waits for the loads of its SM.
__device__ __forceinline__ void carry(const Context& c, const StagedPeers& staged,
                                      const Route& route) {
  constexpr int kAtOnce = 4;  // loads of a thread that are on their way
  const int pieces = route.pieces(), all = pieces * staged.count;
  const auto step = static_cast<int>(blockDim.x);
#pragma unroll 1
  for (int base = 0; base < all; base += kAtOnce * step) {
    CarriedWords at[kAtOnce];
    device::Words come[kAtOnce] = {}, known[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int piece = base + i * step + static_cast<int>(threadIdx.x);
      if (piece >= all) continue;
      at[i] = CarriedWords::of(c, staged.ranks[piece / pieces], route.offset_of(piece % pieces));
      come[i] = device::load_relaxed_system(at[i].there);
      known[i] = device::load_relaxed_system(at[i].here);
    }
    bool changed = false;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) changed = changed || differ(come[i], known[i]);
    __syncthreads();
    if (!changed) continue;
    device::fence_system();
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (differ(come[i], known[i])) device::store_relaxed_system(at[i].here, come[i]);
  }
}

/// Carries the words of a direction until `done` has counted all workers, or the object has failed;
/// all threads of the courier. Returns whether it is usable. Not inlined, for a kernel without a
/// courier must not grow by it.
__device__ __noinline__ inline bool carry_until(const Context& c, const DirectionSlots& place,
                                                const std::uint32_t* done) {
  static_assert(kMostRanks <= 512, "a thread a peer");
  __shared__ StagedPeers staged;
  if (threadIdx.x == 0) {
    staged.count = 0;
#pragma unroll 1
    for (int peer = 0; peer < c.size; ++peer)
      if (is_staged(c, peer)) staged.ranks[staged.count++] = static_cast<std::uint8_t>(peer);
  }
  __syncthreads();
  const auto thread = static_cast<int>(threadIdx.x);
  const bool controls = thread < staged.count;
  CarriedWords control{};
  device::Words seen{}, next{};
  if (controls) {
    control = CarriedWords::of(c, staged.ranks[thread], place.control);
    seen = device::load_relaxed_system(control.there);
    device::fence_system();
  }
  __syncthreads();
#pragma unroll 1
  for (;;) {
    if (controls) next = device::load_relaxed_system(control.there);
    carry(c, staged, {place.told, place.rows});
    if (controls && differ(next, seen))
      device::fence_system();  // what was told before is seen next
    const bool over =
        thread == 0 && device::load_acquire_system(done) == static_cast<std::uint32_t>(workers(c));
    const bool failed = thread == 0 && device::load_relaxed_system(&c.words->failed) != 0;
    const bool ends = __syncthreads_or(over || failed);
    if (controls) {
      device::fence_gpu();  // what was told has been stored
      device::store_relaxed_system(control.here, seen);
      seen = next;
    }
    if (ends) return __syncthreads_or(failed) == 0;
  }
}

/// The courier's part in place of admit(): carries until all workers have counted themselves done
/// (`of_receive`: at the end of the receive half), so that it is the last of its launch.
__device__ __forceinline__ Entry carry_along(const Context& c, const Direction<KernelAccess>& lane,
                                             const DirectionSlots& place, bool of_receive) {
  Entry entry = enter(c, lane);
  const std::uint32_t* done = of_receive ? &lane.words->receivers_done : &lane.words->senders_done;
  entry.usable = entry.usable && carry_until(c, place, done);
  return entry;
}

/// All that a courier does in a kernel that is a half or both. Not inlined: its registers are
/// wanted elsewhere.
__device__ __noinline__ inline void carry_halves(const Context& c, Direction<KernelAccess> lane,
                                                 const DirectionSlots& place, std::int32_t halves) {
  const bool sends = (halves & kSendHalf) != 0, receives = (halves & kReceiveHalf) != 0;
  const Entry entry = carry_along(c, lane, place, receives);
  if (!entry.usable) return;
  if (receives)
    leave_receive(c, lane, place, entry.receive, false, sends);
  else
    leave_send(lane, entry.send);
}

}  // namespace expertwire::ep::cuda
