#pragma once

// How one warp moves rows: read once into shared memory by the copy engine, and from there written
// to every destination, with the next pieces already on their way. Each warp has a ring of its own,
// so warps never wait for each other. Without a copy engine (before Hopper, or when told so) the
// same calls are made of 16-byte loads and stores.

#include "device/ptx.cuh"
#include "ep/cuda/vectors.cuh"

namespace expertwire::ep::cuda {

inline constexpr int kMostStages = 4;
inline constexpr unsigned kAllLanes = 0xFFFFFFFFU;

/// A warp's ring of stages in shared memory.
struct Ring {
  std::byte* memory = nullptr;
  std::uint64_t* full = nullptr;  // [stages]
  std::uint32_t stage_bytes = 0;
  std::int32_t stages = 0;

  __device__ std::byte* stage(int i) const { return memory + (i % stages) * stage_bytes; }
  __device__ std::uint64_t* barrier(int i) const { return full + i % stages; }
  __device__ std::uint32_t parity(int i) const {
    return static_cast<std::uint32_t>(i / stages) & 1U;
  }
  /// Called by one lane when the ring has carried all that it was given.
  __device__ void end() const {
    for (int s = 0; s < stages; ++s) device::mbarrier_invalidate(full + s);
  }
  /// Called by one lane, then __syncwarp().
  __device__ void init() const {
    for (int s = 0; s < stages; ++s) device::mbarrier_init(full + s, 1);
    device::fence_mbarrier_init();
  }
};

/// Whether this code may use the copy engine.
__device__ __forceinline__ constexpr bool has_bulk_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return true;
#else
  return false;
#endif
}

/// Between an acquire and a bulk copy of what it covers.
__device__ __forceinline__ void let_bulk_copies_see() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  device::fence_proxy_async();
#endif
}

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

/// Moves pieces 0, 1, ... as long as `ready(i)` says that there is an i-th to be read; one warp.
/// `ready` is asked once for each, ahead of its turn. `piece(i)` is the same on all lanes;
/// `land(i)` gives each lane a destination; `done(i, landing)` is called by all lanes when the
/// piece is in the memory of all its destinations, so that a release of the calling lane covers it.
/// The ring is fresh and has two stages or more.
template <class Ready, class PieceOf, class LandingOf, class Done>
__device__ __forceinline__ void move_by_bulk(const Ring& ring, Ready ready, PieceOf piece,
                                             LandingOf land, Done done) {
  const bool first_lane = threadIdx.x % 32 == 0;
  int loaded = 0;
  bool ended = false;
  auto load = [&] {
    ended = ended || !ready(loaded);
    if (ended) return;
    const int i = loaded++;
    const Piece p = piece(i);
    if (first_lane) {
      device::mbarrier_expect(ring.barrier(i), p.bytes);
      if (p.bytes > 0) device::bulk_load(ring.stage(i), p.from, p.bytes, ring.barrier(i));
    }
  };
  for (int s = 0; s < ring.stages; ++s) load();
  Landing previous;
  int i = 0;
  for (; i < loaded; ++i) {
    const Landing current = land(i);
    const std::uint32_t bytes = piece(i).bytes;
    device::mbarrier_wait(ring.barrier(i), ring.parity(i));
    if (current.to != nullptr) device::bulk_store(current.to, ring.stage(i), bytes);
    device::bulk_commit();
    if (i > 0) {
      device::bulk_wait<1>();
      __syncwarp();
      done(i - 1, previous);
      load();
    }
    previous = current;
  }
  device::bulk_wait<0>();
  __syncwarp();
  if (i > 0) done(i - 1, previous);
}

#endif

/// The same by loads and stores.
template <class Ready, class PieceOf, class LandingOf, class Done>
__device__ __forceinline__ void move_by_vectors(Ready ready, PieceOf piece, LandingOf land,
                                                Done done) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int i = 0; ready(i); ++i) {
    const Piece p = piece(i);
    const Landing landing = land(i);
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
    done(i, landing);
  }
}

template <class Ready, class PieceOf, class LandingOf, class Done>
__device__ __forceinline__ void move_pieces(const Ring& ring, bool bulk, Ready ready, PieceOf piece,
                                            LandingOf land, Done done) {
  if constexpr (has_bulk_copies()) {
    if (bulk) return move_by_bulk(ring, ready, piece, land, done);
  }
  move_by_vectors(ready, piece, land, done);
}

}  // namespace expertwire::ep::cuda
