#pragma once

// How one warp moves rows: read once into shared memory by the copy engine, and from there written
// to every destination, with the next pieces already on their way. Each warp has stages of its own,
// so warps never wait for each other. Without a copy engine (before Hopper, or when told so) the
// same calls are made of 16-byte loads and stores.

#include "device/ptx.cuh"
#include "ep/cuda/kernel/tuning.hpp"
#include "ep/cuda/kernel/vectors.cuh"

namespace expertwire::inline v0::ep::cuda {

inline constexpr int kMostStages = 2;

/// A piece of a warp's rows: which of them, in the order of the warp, which piece of it, and which
/// stage it is in. It steps from piece to piece, so that nothing is divided: a warp by itself
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

/// A warp's stages in shared memory, used in turn.
struct Stages {
  std::byte* memory = nullptr;
  std::uint64_t* full = nullptr;  // [stages]
  std::uint32_t stage_bytes = 0;
  std::int32_t count = 0;

  __device__ std::byte* stage(const Cursor& at) const {
    return memory + static_cast<std::uint32_t>(at.stage) * stage_bytes;
  }
  __device__ std::uint64_t* barrier(const Cursor& at) const { return full + at.stage; }
  /// Called by one lane when they have carried all that they were given.
  __device__ void end() const {
#pragma unroll 1
    for (int s = 0; s < count; ++s) device::mbarrier_invalidate(full + s);
  }
  /// Called by one lane, then __syncwarp().
  __device__ void init() const {
#pragma unroll 1
    for (int s = 0; s < count; ++s) device::mbarrier_init(full + s, 1);
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

/// What a role says when it is asked for its next row.
enum class Answer : std::int32_t { row, not_yet, end };

/// What a role says of the rows that it moves; called by all lanes of one warp. While a row is
/// being stored, pieces of the next ones are being loaded:
///
///     row r       ready  piece (load) ........ look  open  land (store) ... done
///     row r + 1                 ready  piece (load) ............. look  open  land (store) ...
///     done
///
/// A role is asked to wait only when nothing of what it has begun can move, and is done with all
/// that has been stored: see ep/protocol/ring.hpp.
template <class Ready, class PieceOf, class Look, class Open, class LandingOf, class Done>
struct Moves {
  Ready ready;     ///< (row, wait): whether there is such a row; in order, ahead of its turn
  PieceOf piece;   ///< (at): where a piece is read, the same on all lanes
  Look look;       ///< (row): asks memory for what `land` will need of it
  Open open;       ///< (row, wait): whether its destinations can be written; false once it failed
  LandingOf land;  ///< (at): where this lane's destination of a piece is, if it has one
  /// (at, landing): the piece is in the memory of all its destinations, so that a release of the
  /// calling lane covers it.
  Done done;
};
template <class Ready, class PieceOf, class Look, class Open, class LandingOf, class Done>
Moves(Ready, PieceOf, Look, Open, LandingOf, Done)
    -> Moves<Ready, PieceOf, Look, Open, LandingOf, Done>;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/// Moves rows 0, 1, ... until `ready` says that there is no more. The stages are fresh, and
/// two or more.
template <class Role>
__device__ __forceinline__ void move_by_bulk(const Stages& stages, int pieces, Role moves) {
  const bool first_lane = threadIdx.x % 32 == 0;
  Cursor loading, moving, previous;
  Landing landed;
  int rows = 0, looked = 0;  // rows known to be there, and looked at
  int on_way = 0;            // pieces that are loaded and not stored
  bool stored = false;       // the previous piece is not known to be done
  bool ended = false;
  auto ask = [&](bool wait) {
    if (ended || loading.row < rows) return;
    const Answer answer = moves.ready(rows, wait);
    if (answer == Answer::row) ++rows;
    ended = answer == Answer::end;
  };
  auto load = [&] {
    if (loading.row >= rows) ask(false);
    if (loading.row >= rows) return false;
    const Piece p = moves.piece(loading);
    if (first_lane) {
      device::mbarrier_expect(stages.barrier(loading), p.bytes);
      if (p.bytes > 0)
        device::bulk_load(stages.stage(loading), p.from, p.bytes, stages.barrier(loading));
    }
    ++on_way;
    loading.step(pieces, stages.count);
    if (loading.piece == 0) ask(false);
    return true;
  };
  auto finish = [&] {
    if (!stored) return;
    device::bulk_wait<0>();
    __syncwarp();
    moves.done(previous, landed);
    stored = false;
  };
  auto look = [&](int row) {
    if (looked > row || row >= rows) return;
    moves.look(row);
    looked = row + 1;
  };
#pragma unroll 1
  for (;;) {
#pragma unroll 1
    while (on_way + (stored ? 1 : 0) < stages.count && load()) {
    }
    if (on_way == 0) {
      finish();
      if (ended) break;
      ask(true);
      continue;
    }
    look(moving.row);
    if (moving.piece == 0 && !moves.open(moving.row, false)) {
      finish();
      moves.open(moving.row, true);
    }
    const Landing current = moves.land(moving);
    const std::uint32_t bytes = moves.piece(moving).bytes;
    device::mbarrier_wait(stages.barrier(moving), moving.parity);
    if (current.to != nullptr) device::bulk_store(current.to, stages.stage(moving), bytes);
    device::bulk_commit();
    --on_way;
    if (moving.piece == pieces - 1) look(moving.row + 1);
    const bool before = stored;
    const Cursor done = previous;
    const Landing there = landed;
    stored = true;
    previous = moving;
    landed = current;
    moving.step(pieces, stages.count);
    if (!before) continue;
    device::bulk_wait<1>();
    __syncwarp();
    load();  // first: what is said of the piece before may take as long as this does
    moves.done(done, there);
  }
}

#endif

/// The same by loads and stores; each row is done before the next.
template <class Role>
__device__ __forceinline__ void move_by_vectors(int pieces, Role moves) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
  for (Cursor at; at.piece > 0 || moves.ready(at.row, true) == Answer::row; at.step(pieces, 1)) {
    const Piece p = moves.piece(at);
    if (at.piece == 0) {
      moves.look(at.row);
      moves.open(at.row, true);
    }
    const Landing landing = moves.land(at);
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
    moves.done(at, landing);
  }
}

/// Through the stages, if there are bulk copies, else by loads and stores.
template <class Role>
__device__ __forceinline__ void move_rows(const Stages& stages, const Moving& moving, Role moves) {
  if constexpr (has_bulk_copies()) {
    if (moving.bulk) return move_by_bulk(stages, moving.pieces, moves);
  }
  move_by_vectors(moving.pieces, moves);
}

}  // namespace expertwire::ep::cuda
