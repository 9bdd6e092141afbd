#pragma once

// How one warp moves rows: read once into shared memory by the copy engine, and from there written
// to every destination, with the next pieces already on their way. Each warp has a ring of its own,
// so warps never wait for each other. Without a copy engine (before Hopper, or when told so) the
// same calls are made of 16-byte loads and stores.

#include "device/ptx.cuh"
#include "ep/cuda/kernel/vectors.cuh"

namespace expertwire::inline v0::ep::cuda {

inline constexpr int kMostStages = 4;

/// A piece of a warp's rows: which of them, in the order of the warp, which piece of it, and where
/// it is in the ring. It steps from piece to piece, so that nothing is divided: a warp by itself
/// waits for each of its instructions.
struct Cursor {
  std::int32_t row = 0, piece = 0, stage = 0;
  std::uint32_t parity = 0;

  __device__ __forceinline__ void step(int pieces, int stages) {
    if (++piece == pieces) {
      piece = 0;
      ++row;
    }
    if (++stage == stages) {
      stage = 0;
      parity ^= 1U;
    }
  }
};

/// A warp's ring of stages in shared memory.
struct Ring {
  std::byte* memory = nullptr;
  std::uint64_t* full = nullptr;  // [stages]
  std::uint32_t stage_bytes = 0;
  std::int32_t stages = 0;

  __device__ std::byte* stage(const Cursor& at) const {
    return memory + static_cast<std::uint32_t>(at.stage) * stage_bytes;
  }
  __device__ std::uint64_t* barrier(const Cursor& at) const { return full + at.stage; }
  /// Called by one lane when the ring has carried all that it was given.
  __device__ void end() const {
#pragma unroll 1
    for (int s = 0; s < stages; ++s) device::mbarrier_invalidate(full + s);
  }
  /// Called by one lane, then __syncwarp().
  __device__ void init() const {
#pragma unroll 1
    for (int s = 0; s < stages; ++s) device::mbarrier_init(full + s, 1);
    device::fence_proxy_async_shared();
  }
};

using device::has_bulk_copies;
using device::kAllLanes;
using device::let_bulk_copies_see;

/// Where a piece goes, for one lane: null if this lane has no destination.
struct Landing {
  std::byte* to = nullptr;
  std::int32_t rank = -1;
  std::int32_t row = -1;
};

struct Piece {
  const std::byte* from;
  std::uint32_t bytes;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/// Moves rows 0, 1, ... as long as `ready(row)` says that there is one, which is asked once for
/// each, ahead of its turn; one warp. `piece(at)` is the same on all lanes. `look(row)` asks memory
/// for what `land` will need of that row, while the row before is on its way; `land(at)` gives each
/// lane a destination; `done(at, landing)` is called by all lanes when the piece is in the memory
/// of all its destinations, so that a release of the calling lane covers it. The ring is fresh and
/// has two stages or more.
template <class Ready, class PieceOf, class Look, class LandingOf, class Done>
__device__ __forceinline__ void move_by_bulk(const Ring& ring, int pieces, Ready ready,
                                             PieceOf piece, Look look, LandingOf land, Done done) {
  const bool first_lane = threadIdx.x % 32 == 0;
  Cursor loading, moving, previous;
  Landing landed;
  int rows = 0, on_way = 0;  // rows known to be there; pieces that are loaded and not stored
  bool ended = false;
  auto ask = [&] {
    if (!ended && ready(rows))
      ++rows;
    else
      ended = true;
  };
  auto load = [&] {
    if (loading.row >= rows) return;
    const Piece p = piece(loading);
    if (first_lane) {
      device::mbarrier_expect(ring.barrier(loading), p.bytes);
      if (p.bytes > 0)
        device::bulk_load(ring.stage(loading), p.from, p.bytes, ring.barrier(loading));
    }
    ++on_way;
    loading.step(pieces, ring.stages);
    if (loading.piece == 0) ask();
  };
  ask();
  for (int s = 0; s < ring.stages; ++s) load();
  if (rows > 0) look(0);
  bool first = true;
#pragma unroll 1
  for (; on_way > 0; --on_way) {
    const Landing current = land(moving);
    const std::uint32_t bytes = piece(moving).bytes;
    device::mbarrier_wait(ring.barrier(moving), moving.parity);
    if (current.to != nullptr) device::bulk_store(current.to, ring.stage(moving), bytes);
    device::bulk_commit();
    if (moving.piece == pieces - 1 && moving.row + 1 < rows) look(moving.row + 1);
    if (!first) {
      device::bulk_wait<1>();
      __syncwarp();
      done(previous, landed);
      load();
    }
    first = false;
    previous = moving;
    landed = current;
    moving.step(pieces, ring.stages);
  }
  device::bulk_wait<0>();
  __syncwarp();
  if (!first) done(previous, landed);
}

#endif

/// The same by loads and stores.
template <class Ready, class PieceOf, class Look, class LandingOf, class Done>
__device__ __forceinline__ void move_by_vectors(int pieces, Ready ready, PieceOf piece, Look look,
                                                LandingOf land, Done done) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
  for (Cursor at; at.piece > 0 || ready(at.row); at.step(pieces, 1)) {
    const Piece p = piece(at);
    if (at.piece == 0) look(at.row);
    const Landing landing = land(at);
    const unsigned landed = __ballot_sync(kAllLanes, landing.to != nullptr);
    const auto vectors = static_cast<int>(p.bytes / sizeof(uint4));
    for (int base = 0; base < vectors; base += 32 * kInFlight) {
      uint4 held[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j)
        if (base + 32 * j + lane < vectors)
          held[j] = reinterpret_cast<const uint4*>(p.from)[base + 32 * j + lane];
      for (unsigned rest = landed; rest != 0; rest &= rest - 1) {
        const auto to = __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(landing.to),
                                    __ffs(static_cast<int>(rest)) - 1);
#pragma unroll
        for (int j = 0; j < kInFlight; ++j)
          if (base + 32 * j + lane < vectors)
            reinterpret_cast<uint4*>(to)[base + 32 * j + lane] = held[j];
      }
    }
    __syncwarp();
    done(at, landing);
  }
}

/// A ring, if there are bulk copies, else loads and stores.
template <class Ready, class PieceOf, class Look, class LandingOf, class Done>
__device__ __forceinline__ void move_rows(const Ring& ring, int pieces, bool bulk, Ready ready,
                                          PieceOf piece, Look look, LandingOf land, Done done) {
  if constexpr (has_bulk_copies()) {
    if (bulk) return move_by_bulk(ring, pieces, ready, piece, look, land, done);
  }
  move_by_vectors(pieces, ready, piece, look, land, done);
}

}  // namespace expertwire::ep::cuda
