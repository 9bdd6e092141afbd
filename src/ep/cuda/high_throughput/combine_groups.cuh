#pragma once

// Roles of combine where rows are grouped by expert (see groups.cuh): a warp gathers the rows of a
// token, a lane a row, and adds them, on their way home and again at home.

#include "ep/cuda/high_throughput/combine.cuh"

namespace expertwire::inline v0::ep::cuda {

/// The rows of one sum. Lanes up to `width` have rows that are added in their order. If `own` is
/// one of them, what it has and what lanes from `width` on have are copies of this rank's row:
/// their sum is rounded, and added at the place of `own`.
struct Gathered {
  const std::byte* row = nullptr;  ///< this lane's, null: none
  float weight = 1;                ///< by which it is multiplied
  int width = 32, own = 32;        ///< the same on all lanes; own 32: none
};

/// Adds vectors of the rows to those of `init`, or to nothing; `row_of(lane, present)` is where a
/// lane's row can be read.
template <class Element, class RowOf>
__device__ __forceinline__ void add_gathered(const Gathered& gathered, RowOf row_of,
                                             const uint4* init, uint4* out, int vectors) {
  constexpr int kAtOnce = 2;  // a piece of a row is little
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned present = __ballot_sync(kAllLanes, gathered.row != nullptr);
  const unsigned first = gathered.width < 32 ? (1U << gathered.width) - 1 : kAllLanes;
  const unsigned own = gathered.own < 32 ? 1U << gathered.own : 0;
#pragma unroll 1
  for (int base = lane; base - lane < vectors; base += kAtOnce * 32) {
    float acc[kAtOnce][Element::kLanes] = {}, copies[kAtOnce][Element::kLanes] = {};
    auto add = [&](float weight, const uint4* from, float(*to)[Element::kLanes]) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (base + i * 32 < vectors) Element::add(weight, from[base + i * 32], to[i]);
    };
    auto add_rows = [&](unsigned set, float(*to)[Element::kLanes]) {
#pragma unroll 1
      for (; set != 0; set &= set - 1) {
        const int from = __ffs(static_cast<int>(set)) - 1;
        const float weight = __shfl_sync(kAllLanes, gathered.weight, from);
        add(weight, reinterpret_cast<const uint4*>(row_of(from, present)), to);
      }
    };
    if (init != nullptr) add(1.0F, init, acc);
    if (own == 0) {
      add_rows(present & first, acc);
    } else {
      add_rows(present & (own | ~first), copies);
      add_rows(present & first & (own - 1), acc);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) Element::add(1.0F, Element::round(copies[i]), acc[i]);
      add_rows(present & first & ~own & ~(own - 1), acc);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (base + i * 32 < vectors) out[base + i * 32] = Element::round(acc[i]);
  }
}

/// What a role says of the sums that it makes; called by all lanes of one warp.
template <class Ready, class Gather, class ToOf, class Read, class Done>
struct Sums {
  Ready ready;    ///< (i, wait): whether there is an i-th, as in Moves
  Gather gather;  ///< (i): the rows of it, which are there
  ToOf to;        ///< (i): {init, out}, the same on all lanes
  Read read;      ///< (i): its rows have been read
  Done done;      ///< (i): it has been written
};
template <class Ready, class Gather, class ToOf, class Read, class Done>
Sums(Ready, Gather, ToOf, Read, Done) -> Sums<Ready, Gather, ToOf, Read, Done>;

struct SumPlace {
  const std::byte* init;  ///< or null
  std::byte* out;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/// Makes sums 0, 1, ... until `ready` says that there is no more: pieces of the next rows are on
/// their way to a stage, side by side, while those of another are added.
template <class Element, class Role>
__device__ __forceinline__ void sum_by_stages(const Stages& stages, const Moving& moving,
                                              std::uint32_t row_bytes, Role sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Cursor loading, summing;
  Gathered to_load, to_sum;
  SumPlace place{};
  int known = 0, on_way = 0;
  bool ended = false;
  auto ask = [&](bool wait) {
    if (ended || loading.row < known) return;
    const Answer answer = sums.ready(known, wait);
    if (answer == Answer::row) ++known;
    ended = answer == Answer::end;
  };
  auto load = [&] {
    ask(false);
    if (loading.row >= known) return false;
    if (loading.piece == 0) to_load = sums.gather(loading.row);
    const unsigned present = __ballot_sync(kAllLanes, to_load.row != nullptr);
    const std::uint32_t bytes = bytes_of(moving, row_bytes, loading);
    if (lane == 0) device::mbarrier_expect(stages.barrier(loading), bytes * __popc(present));
    __syncwarp();
    if (to_load.row != nullptr)
      device::bulk_load(
          stages.stage(loading) + __popc(present & ((1U << lane) - 1)) * moving.piece_bytes,
          to_load.row + offset_of(moving, loading), bytes, stages.barrier(loading));
    ++on_way;
    loading.step(moving.pieces, stages.count);
    return true;
  };
#pragma unroll 1
  for (;;) {
#pragma unroll 1
    while (on_way < stages.count && load()) {
    }
    if (on_way == 0) {
      if (ended) break;
      ask(true);
      continue;
    }
    if (summing.piece == 0) {
      to_sum = sums.gather(summing.row);
      place = sums.to(summing.row);
    }
    const bool last = summing.piece == moving.pieces - 1;
    device::mbarrier_wait(stages.barrier(summing), summing.parity);
    if (last) sums.read(summing.row);
    const std::byte* stage = stages.stage(summing);
    const std::uint64_t offset = offset_of(moving, summing);
    add_gathered<Element>(
        to_sum,
        [&](int from, unsigned present) {
          return stage + __popc(present & ((1U << from) - 1)) * moving.piece_bytes;
        },
        place.init != nullptr ? reinterpret_cast<const uint4*>(place.init + offset) : nullptr,
        reinterpret_cast<uint4*>(place.out + offset),
        static_cast<int>(bytes_of(moving, row_bytes, summing) / sizeof(uint4)));
    __syncwarp();
    if (last) sums.done(summing.row);
    --on_way;
    summing.step(moving.pieces, stages.count);
  }
}

#endif

/// The same by loads, each sum done before the next.
template <class Element, class Role>
__device__ __forceinline__ void sum_by_loads(std::uint32_t row_bytes, Role sums) {
#pragma unroll 1
  for (int i = 0; sums.ready(i, true) == Answer::row; ++i) {
    const Gathered gathered = sums.gather(i);
    const SumPlace place = sums.to(i);
    add_gathered<Element>(
        gathered,
        [&](int from, unsigned) {
          return reinterpret_cast<const std::byte*>(
              __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(gathered.row), from));
        },
        reinterpret_cast<const uint4*>(place.init), reinterpret_cast<uint4*>(place.out),
        static_cast<int>(row_bytes / sizeof(uint4)));
    __syncwarp();
    sums.read(i);
    sums.done(i);
  }
}

/// One warp; `moving` has room for the most rows of a sum.
template <class Element, class Role>
__device__ __forceinline__ void make_sums(BlockShared& s, const HighThroughputCombineParams& p,
                                          const Moving& moving, int warp, Role sums) {
  const auto row_bytes = static_cast<std::uint32_t>(p.shape.slots.sizes.row_bytes);
  if constexpr (has_bulk_copies()) {
    if (moving.bulk) {
      const Stages stages = stages_of(s, moving, warp, p.shape.top_k);
      sum_by_stages<Element>(stages, moving, row_bytes, sums);
      if (threadIdx.x % 32 == 0) stages.end();  // the warp may make other sums
      __syncwarp();
      return;
    }
  }
  sum_by_loads<Element>(row_bytes, sums);
}

__device__ __forceinline__ const std::byte* row_at(const HighThroughputCombineParams& p,
                                                   std::int32_t place) {
  return place < 0 ? nullptr
                   : p.y + static_cast<std::uint64_t>(place) * p.shape.slots.sizes.row_bytes;
}

/// Adds the copies of tokens that came, and writes the sums to the rings of the ranks that they
/// came from, as there is room.
template <class Element>
__device__ bool push_sums(const HighThroughputCombineParams& p, BlockShared& s, int warp) {
  const Context& c = p.context;
  const HighThroughputSlots& slots = p.shape.slots;
  const RingSlots& ring = slots.ring;
  const int lane = static_cast<int>(threadIdx.x) % 32, blocks = writing_blocks(c);
  const Servers servers{warp * blocks + static_cast<int>(blockIdx.x), p.pushers * blocks,
                        p.tickets + kRingTickets};
  auto rows_of = [&](int source) { return s.rows_from(c, p.routing, source); };
  auto frame_of = [&](const Served::Row& at) {
    return s.frames_to[at.peer] + static_cast<Epoch>(at.row);
  };
  auto can_move = [&](const Served::Row& at) {
    return is_free(s, ring, at.peer, static_cast<std::uint32_t>(at.row)) ||
           has_room(c, ring, at.peer, frame_of(at));
  };
  Served served(c, servers, rows_of);
  Served::Row held{};  // lane i % 32: the i-th row
  Written written(p.queue, p.queue_places, is_direct(p, s));
  bool good = true;
  auto ready = [&](int i, bool wait) {
    if (wait) written.post(c, ring, s.frames_to);
    Served::Row found{};
    const Answer answer = served.next(c, Phase::credit, wait, rows_of, can_move, &found, &good);
    if (answer == Answer::row && lane == i % 32) held = found;
    return answer;
  };
  auto held_at = [&](int i) -> Served::Row {
    return {__shfl_sync(kAllLanes, held.peer, i % 32), __shfl_sync(kAllLanes, held.row, i % 32)};
  };
  auto gather = [&](int i) -> Gathered {
    const Served::Row row = held_at(i);
    const Copies copies = copies_of(p, row.peer, row.row);
    return {row_at(p, copies.place), copies.weight};
  };
  auto to = [&](int i) -> SumPlace {
    const Served::Row row = held_at(i);
    return {nullptr, frame_to(c, ring, row.peer, frame_of(row))};
  };
  auto read = [](int) {};
  auto done = [&](int i) {
    const Served::Row row = held_at(i);
    std::byte* frame = frame_to(c, ring, row.peer, frame_of(row));
    if (p.topk_weights != nullptr && lane < p.shape.top_k)
      reinterpret_cast<float*>(frame + slots.combined.weights)[lane] =
          weight_home(p, copies_of(p, row.peer, row.row));
    __syncwarp();
    if (written.add(lane == 0 ? row.peer : -1, row.row)) written.post(c, ring, s.frames_to);
  };
  make_sums<Element>(s, p, p.pushing, warp, Sums{ready, gather, to, read, done});
  written.post(c, ring, s.frames_to);
  return good;
}

/// The copies of a token's own row, if it has one, and its lane, or 32.
__device__ __forceinline__ Copies own_copies(const HighThroughputCombineParams& p,
                                             const Origin& origin, int* own) {
  const unsigned home = __ballot_sync(kAllLanes, origin.from.rank == p.context.rank);
  *own = home != 0 ? __ffs(static_cast<int>(home)) - 1 : 32;
  const int row = __shfl_sync(kAllLanes, origin.from.row, *own % 32);
  return *own < 32 ? copies_of(p, p.context.rank, row) : Copies();
}

/// The rows of a token. As in dispatch, the first of its own copies takes the lane of its own row,
/// the others take those behind all rows.
__device__ __forceinline__ Gathered gather(const Summer& w, const Origin& origin, int own,
                                           const Copies& copies) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Gathered all;
  all.own = own;
  all.width = __popc(__ballot_sync(kAllLanes, origin.from.rank >= 0));
  const unsigned lanes = copies.lanes();
  const int number = lane == own ? 0 : lane - all.width + 1;
  const bool has = own < 32 && (lane == own || lane >= all.width) && number < __popc(lanes);
  const int from = has ? lane_of(lanes, number) : 0;
  const std::int32_t place = __shfl_sync(kAllLanes, copies.place, from);
  const float weight = __shfl_sync(kAllLanes, copies.weight, from);
  if (has) all.weight = weight;
  all.row = has ? row_at(w.p, place) : lane == own ? nullptr : w.row_of(origin);
  return all;
}

/// Sums the tokens that `rows` gives: what came home, and this rank's own copies.
template <class Element, class Rows>
__device__ bool sum_with_copies(const Summer& w, Rows& rows, int warp) {
  const HighThroughputCombineParams& p = w.p;
  const Context& c = p.context;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Owed owed;
  Origin next;
  bool good = true, taken = false;
  auto ready = [&](int i, bool wait) {
    if (!taken && !rows.take(i)) return Answer::end;
    if (!taken) next = w.origin(rows.at(i), lane);
    taken = true;
    if (wait) owed.give_back(c, w.ring());
    if (!w.there_are_all(next, wait)) {
      good = !wait;
      return wait ? Answer::end : Answer::not_yet;
    }
    let_bulk_copies_see();
    owed.give_back(c, w.ring());
    taken = false;
    return Answer::row;
  };
  auto gathered = [&](int i) {
    const Origin origin = w.origin(rows.at(i), lane);
    int own = 0;
    const Copies copies = own_copies(p, origin, &own);
    return gather(w, origin, own, copies);
  };
  auto to = [&](int i) -> SumPlace {
    const std::uint64_t offset =
        static_cast<std::uint64_t>(rows.at(i)) * p.shape.slots.sizes.row_bytes;
    return {p.bias != nullptr ? p.bias + offset : nullptr, p.out + offset};
  };
  auto read = [&](int i) {
    const int token = rows.at(i);
    const Origin origin = w.origin(token, lane);
    int own = 0;
    if (p.out_topk_weights != nullptr)
      w.take_weights(token, lane, origin, own_copies(p, origin, &own));
    w.finish(origin, &owed);
  };
  auto done = [](int) {};
  make_sums<Element>(w.s, p, p.summing, warp, Sums{ready, gathered, to, read, done});
  owed.give_back(c, w.ring());
  return good;
}

}  // namespace expertwire::ep::cuda
