#pragma once

// Roles of combine where rows are grouped by expert. See groups.cuh.

#include "ep/cuda/high_throughput/combine.cuh"

namespace expertwire::inline v0::ep::cuda {

/// Adds the copies of rows that are grouped by expert, and writes the sums to the rings of the
/// ranks that the rows came from, as there is room.
template <class Element>
__device__ bool push_sums(const HighThroughputCombineParams& p, const BlockShared& s, int warp) {
  constexpr int kAtOnce = 4;
  const Context& c = p.context;
  const HighThroughputSlots& slots = p.shape.slots;
  const RingSlots& ring = slots.ring;
  const int lane = static_cast<int>(threadIdx.x) % 32, blocks = writing_blocks(c);
  const auto vectors = static_cast<int>(slots.sizes.row_bytes / sizeof(uint4));
  const auto* y = reinterpret_cast<const uint4*>(p.y);
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
  Written written(p.queue, p.queue_places, is_direct(p, s));
  bool good = true;
#pragma unroll 1
  for (;;) {
    Served::Row row{};
    Answer answer = served.next(c, Phase::credit, false, rows_of, can_move, &row, &good);
    if (answer == Answer::not_yet) {
      written.post(c, ring, s.frames_to);
      answer = served.next(c, Phase::credit, true, rows_of, can_move, &row, &good);
    }
    if (answer != Answer::row) break;
    const Copies copies = copies_of(p, row.peer, row.row);
    const unsigned lanes = copies.lanes();
    std::byte* frame = frame_to(c, ring, row.peer, frame_of(row));
#pragma unroll 1
    for (int base = lane; base - lane < vectors; base += 32 * kAtOnce) {
      uint4 sums[kAtOnce];
      add_copies<Element, kAtOnce>(y, vectors, copies, lanes, base, vectors, sums);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (base + i * 32 < vectors) reinterpret_cast<uint4*>(frame)[base + i * 32] = sums[i];
    }
    if (p.topk_weights != nullptr && lane < p.shape.top_k)
      reinterpret_cast<float*>(frame + slots.combined.weights)[lane] = weight_home(p, copies);
    __syncwarp();
    if (written.add(lane == 0 ? row.peer : -1, row.row)) written.post(c, ring, s.frames_to);
  }
  written.post(c, ring, s.frames_to);
  return good;
}

/// Sums the tokens that `rows` gives; this rank's own is the sum of its copies.
template <class Element, class Rows>
__device__ bool sum_with_copies(const Summer& w, Rows& rows) {
  constexpr int kAtOnce = 2;
  const HighThroughputCombineParams& p = w.p;
  const int lane = static_cast<int>(threadIdx.x) % 32, self = p.context.rank;
  const auto vectors = static_cast<int>(p.shape.slots.sizes.row_bytes / sizeof(uint4));
  const auto* y = reinterpret_cast<const uint4*>(p.y);
  Owed owed;
  for (int i = 0; rows.take(i); ++i) {
    const int token = rows.at(i);
    const Origin origin = w.origin(token, lane);
    const unsigned home = __ballot_sync(kAllLanes, origin.from.rank == self);
    const int own = home != 0 ? __ffs(static_cast<int>(home)) - 1 : 32;  // the lane of own rows
    const int own_row = __shfl_sync(kAllLanes, origin.from.row, own % 32);
    const Copies copies = own < 32 ? copies_of(p, self, own_row) : Copies();
    const unsigned lanes = copies.lanes();
    if (!w.there_are_all(origin, true)) return false;
    const std::byte* row = lane == own ? nullptr : w.row_of(origin);
    const unsigned present = __ballot_sync(kAllLanes, row != nullptr) | home;
    const std::uint64_t offset = static_cast<std::uint64_t>(token) * p.shape.slots.sizes.row_bytes;
#pragma unroll 1
    for (int base = lane; base - lane < vectors; base += 32 * kAtOnce) {
      uint4 sums[kAtOnce];
      if (own < 32) add_copies<Element, kAtOnce>(y, vectors, copies, lanes, base, vectors, sums);
      float acc[kAtOnce][Element::kLanes] = {};
      if (p.bias != nullptr)
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v)
          if (base + v * 32 < vectors)
            Element::add(1.0F, reinterpret_cast<const uint4*>(p.bias + offset)[base + v * 32],
                         acc[v]);
#pragma unroll 1
      for (unsigned rest = present; rest != 0; rest &= rest - 1) {
        const int from = __ffs(static_cast<int>(rest)) - 1;
        const auto* there = reinterpret_cast<const uint4*>(
            __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(row), from));
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v)
          if (base + v * 32 < vectors)
            Element::add(1.0F, from == own ? sums[v] : there[base + v * 32], acc[v]);
      }
#pragma unroll
      for (int v = 0; v < kAtOnce; ++v)
        if (base + v * 32 < vectors)
          reinterpret_cast<uint4*>(p.out + offset)[base + v * 32] = Element::round(acc[v]);
    }
    if (p.out_topk_weights != nullptr) w.take_weights(token, lane, origin, copies);
    w.finish(origin, &owed);
    owed.give_back(p.context, w.ring());
  }
  return true;
}

}  // namespace expertwire::ep::cuda
