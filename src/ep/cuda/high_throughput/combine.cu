// High-throughput combine: the row that each rank made of a token comes home, and the rows of a
// token are added in ascending order of rank.
//
// Roles. The first block tells every rank where this one's rows will be: in its pool, where peers
// read them (pull), or pushed through rings. Pushing warps, up to half of a block, serve the rings
// of their sources as they have room, and then sum as the others do. A summing warp takes tokens in
// ascending order and holds the rows of one side by side in stages of its ring, the next pieces on
// their way while one is added.
//
// Who writes what. A pair is written by one rank, that of the experts; a frame, and a token of the
// output, by one warp.
//
// Memory order. Pull: the rows were written before this kernel, on this stream; they are released
// by the offer's flag. Push: as in dispatch. Whoever acquires a flag and reads by the copy engine
// puts a proxy fence between. Pool rows that peers read go back to the senders only when every peer
// has granted this epoch, which it does after its last read.
//
// Cost. Pull: the rows of a token cross the wire once, as reads. Push: once as writes, and are read
// again here.

#include "ep/cuda/high_throughput/combine_groups.cuh"

namespace expertwire::inline v0::ep::cuda {

// Config -----------------------------------------------------------------------------------------

namespace {

// Params -----------------------------------------------------------------------------------------

using Params = HighThroughputCombineParams;

// Roles: pusher ----------------------------------------------------------------------------------

/// Writes rows to the rings of the ranks that they came from, as there is room.
__device__ bool push_rows(const Params& p, BlockShared& s, int warp) {
  const Context& c = p.context;
  const HighThroughputSlots& slots = p.shape.slots;
  const RingSlots& ring = slots.ring;
  const int lane = static_cast<int>(threadIdx.x) % 32, blocks = writing_blocks(c);
  const auto row_bytes = static_cast<std::uint32_t>(slots.sizes.row_bytes);
  const Servers servers{warp * blocks + static_cast<int>(blockIdx.x), p.pushers * blocks,
                        p.tickets + kRingTickets};
  auto rows_of = [&](int source) { return s.rows_from(c, p.routing, source); };
  Served served(c, servers, rows_of);
  Served::Row held{};  // lane i % 32: the i-th row
  Written written(p.queue, p.queue_places, is_direct(p, s));
  float weight = 0;
  bool good = true;
  auto frame_of = [&](const Served::Row& at) {
    return s.frames_to[at.peer] + static_cast<Epoch>(at.row);
  };
  auto ready = [&](int i, bool wait) {
    if (wait) written.post(c, ring, s.frames_to);
    Served::Row found{};
    const Answer answer = served.next(
        c, Phase::credit, wait, rows_of,
        [&](const Served::Row& at) {
          return is_free(s, ring, at.peer, static_cast<std::uint32_t>(at.row)) ||
                 has_room(c, ring, at.peer, frame_of(at));
        },
        &found, &good);
    if (answer != Answer::row) return answer;
    if (!is_free(s, ring, found.peer, static_cast<std::uint32_t>(found.row))) let_bulk_copies_see();
    if (lane == i % 32) held = found;
    return answer;
  };
  auto row_at = [&](int i) -> Served::Row {
    return {__shfl_sync(kAllLanes, held.peer, i % 32), __shfl_sync(kAllLanes, held.row, i % 32)};
  };
  auto place_of = [&](const Served::Row& at) {
    return std::uint64_t{
        s.run_from(c, p.routing, at.peer).place(static_cast<std::uint32_t>(at.row))};
  };
  auto piece = [&](const Cursor& at) {
    return piece_of(p.pushing, p.y + place_of(row_at(at.row)) * row_bytes, row_bytes, at);
  };
  const bool weighs = p.topk_weights != nullptr && lane < p.shape.top_k;
  auto look = [&](int i) {
    const std::uint64_t place = place_of(row_at(i));
    if (weighs) weight = p.topk_weights[place * static_cast<std::uint32_t>(p.shape.top_k) + lane];
  };
  auto open = [](int, bool) { return true; };
  auto land = [&](const Cursor& at) -> Landing {
    const Served::Row to = row_at(at.row);
    std::byte* frame = frame_to(c, ring, to.peer, frame_of(to));
    if (at.piece == 0 && weighs)
      reinterpret_cast<float*>(frame + slots.combined.weights)[lane] = weight;
    return {lane == 0 ? frame + offset_of(p.pushing, at) : nullptr, to.peer, to.row};
  };
  auto done = [&](const Cursor& at, const Landing& landing) {
    if (at.piece == p.pushing.pieces - 1 && written.add(lane == 0 ? landing.rank : -1, landing.row))
      written.post(c, ring, s.frames_to);
  };
  const Stages stages = stages_of(s, p.pushing, warp, 1);
  move_rows(stages, p.pushing, Moves{ready, piece, look, open, land, done});
  written.post(c, ring, s.frames_to);
  if (has_bulk_copies() && p.pushing.bulk) {
    if (lane == 0) stages.end();  // the warp will sum, with stages of another form
    __syncwarp();
  }
  return good;
}

/// Announces what all pushers of the grid write, unless they do; one warp of it.
__device__ void announce_rows(const Params& p, const BlockShared& s) {
  if (!is_direct(p, s))
    announce_frames(p.context, p.shape.slots.ring, {p.queue, p.queue_places}, rows_home(p, s),
                    s.frames_to);
}

// Roles: summer ----------------------------------------------------------------------------------

/// Adds `vectors` vectors of `count` rows side by side in `stage` and writes the sums; one warp. A
/// lane has several vectors at once, and the rows follow each other without a test for each: with
/// few SMs it is instructions that limit this kernel.
template <class Element>
__device__ __forceinline__ void add_stage(const std::byte* stage, std::uint32_t row_bytes,
                                          int count, const uint4* bias, uint4* out, int vectors) {
  constexpr int kAtOnce = 4;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int base = lane; base < vectors; base += kAtOnce * 32) {
    float acc[kAtOnce][Element::kLanes] = {};
    const bool whole = base - lane + kAtOnce * 32 <= vectors;  // the same on all lanes
    if (bias != nullptr)
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (base + i * 32 < vectors) Element::add(1.0F, bias[base + i * 32], acc[i]);
    const std::byte* row = stage;
#pragma unroll 1
    for (int r = 0; r < count; ++r, row += row_bytes) {
      const auto* from = reinterpret_cast<const uint4*>(row) + base;
      uint4 held[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (whole || base + i * 32 < vectors) held[i] = from[i * 32];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) Element::add(1.0F, held[i], acc[i]);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (whole || base + i * 32 < vectors) out[base + i * 32] = Element::round(acc[i]);
  }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/// Sums the tokens that `rows` gives, an OwnRows or SharedRows.
template <class Element, class Rows>
__device__ bool sum_by_bulk(const Summer& w, Rows& rows, int warp) {
  const Params& p = w.p;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int pieces = p.summing.pieces;
  const auto row_bytes = static_cast<std::uint32_t>(p.shape.slots.sizes.row_bytes);
  const Stages stages = stages_of(w.s, p.summing, warp, p.shape.width);
  std::uint8_t* held = w.s.held[warp];
  Cursor loading, summing;
  int on_way = 0;
  bool good = true, taken = false, ended = false;  // taken: the token to load, whose rows may come
  bool seen = false, next_taken = false, next_seen = false;  // its rows; the same of the one behind
  Origin origin, next;                                       // of their rows on this lane
  Owed owed;                                                 // of a row that this lane has read
  // Loads a piece, if the token's rows are there; with `wait` it waits for them.
  auto load = [&](bool wait) -> bool {
    if (loading.piece == 0) {
      if (!taken) {
        if (!next_taken) {
          ended = ended || !rows.take(loading.row);
          if (ended) return false;
          origin = w.origin(rows.at(loading.row), lane);
        } else {
          origin = next;
        }
        seen = next_taken && next_seen;
        next_taken = false;
        taken = true;
      }
      if (!seen) {
        if (wait) owed.give_back(p.context, w.ring());
        if (!w.there_are_all(origin, wait)) return false;
        if (!rows.closes(loading.row)) {  // the fence covers the token behind it, if that is there
          rows.take(loading.row + 1);
          next = w.origin(rows.at(loading.row + 1), lane);
          next_seen = w.there_are_all(next, false);
          next_taken = true;
        }
        let_bulk_copies_see();
        owed.give_back(p.context, w.ring());
      }
    }
    const std::byte* row = w.row_of(origin);
    const unsigned present = __ballot_sync(kAllLanes, row != nullptr);
    const std::uint32_t bytes = bytes_of(p.summing, row_bytes, loading);
    if (lane == 0) {
      held[loading.stage] = static_cast<std::uint8_t>(__popc(present));
      device::mbarrier_expect(stages.barrier(loading), bytes * __popc(present));
    }
    __syncwarp();
    if (row != nullptr)
      device::bulk_load(
          stages.stage(loading) + __popc(present & ((1U << lane) - 1)) * p.summing.piece_bytes,
          row + offset_of(p.summing, loading), bytes, stages.barrier(loading));
    ++on_way;
    loading.step(pieces, stages.count);
    taken = loading.piece != 0;
    return true;
  };
#pragma unroll 1
  for (;;) {
#pragma unroll 1
    while (on_way < stages.count && load(false)) {
    }
    if (on_way == 0) {
      if (ended) break;
      good = load(true) || ended;
      if (!good) break;
      continue;
    }
    const int token = rows.at(summing.row);
    const bool last = summing.piece == pieces - 1;
    Origin read;
    if (last) read = w.origin(token, lane);
    device::mbarrier_wait(stages.barrier(summing), summing.parity);
    const std::uint64_t offset =
        static_cast<std::uint64_t>(token) * row_bytes + offset_of(p.summing, summing);
    const auto* bias =
        p.bias != nullptr ? reinterpret_cast<const uint4*>(p.bias + offset) : nullptr;
    if (last) {
      if (p.out_topk_weights != nullptr) w.take_weights(token, lane, read);
      w.finish(read, &owed);
    }
    add_stage<Element>(stages.stage(summing), p.summing.piece_bytes, held[summing.stage], bias,
                       reinterpret_cast<uint4*>(p.out + offset),
                       static_cast<int>(bytes_of(p.summing, row_bytes, summing) / sizeof(uint4)));
    __syncwarp();
    --on_way;
    summing.step(pieces, stages.count);
  }
  owed.give_back(p.context, w.ring());
  return good;
}

#endif

template <class Element, class Rows>
__device__ bool sum_by_vectors(const Summer& w, Rows& rows) {
  const Params& p = w.p;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Owed owed;
  for (int i = 0; rows.take(i); ++i) {
    const int token = rows.at(i);
    const Origin origin = w.origin(token, lane);
    if (!w.there_are_all(origin, true)) return false;
    const std::byte* row = w.row_of(origin);
    const unsigned present = __ballot_sync(kAllLanes, row != nullptr);
    const std::uint64_t offset = static_cast<std::uint64_t>(token) * p.shape.slots.sizes.row_bytes;
    const auto vectors = static_cast<int>(p.shape.slots.sizes.row_bytes / sizeof(uint4));
    for (int v = 0; v < vectors; v += 32) {  // all lanes, for the shuffles
      float acc[Element::kLanes] = {};
      const bool mine = v + lane < vectors;
      if (mine && p.bias != nullptr)
        Element::add(1.0F, reinterpret_cast<const uint4*>(p.bias + offset)[v + lane], acc);
      for (unsigned rest = present; rest != 0; rest &= rest - 1) {
        const auto from = __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(row),
                                      __ffs(static_cast<int>(rest)) - 1);
        if (mine) Element::add(1.0F, reinterpret_cast<const uint4*>(from)[v + lane], acc);
      }
      if (mine) reinterpret_cast<uint4*>(p.out + offset)[v + lane] = Element::round(acc);
    }
    if (p.out_topk_weights != nullptr) w.take_weights(token, lane, origin);
    w.finish(origin, &owed);
    owed.give_back(p.context, w.ring());
  }
  return true;
}

/// The part of one warp of the block. Pulled rows are all there: every warp has its tokens from the
/// start. Pushed ones come in order, and warps that have pushed join those that sum already.
template <class Element, class Layout>
__device__ bool sum_tokens(const Params& p, BlockShared& s, int warp, Epoch n) {
  if (!await_offers(p, n)) return false;
  const Summer summer{p, s, n, *p.epoch};
  const int blocks = workers(p.context), warps = kHighThroughputWarps * blocks;
  auto sum = [&](auto rows) {
    if constexpr (Layout::kGrouped) return sum_with_copies<Element>(summer, rows, warp);
    if constexpr (has_bulk_copies()) {
      if (p.summing.bulk) return sum_by_bulk<Element>(summer, rows, warp);
    }
    return sum_by_vectors<Element>(summer, rows);
  };
  if (p.pull) return sum(OwnRows{warp * blocks + static_cast<int>(blockIdx.x), warps, p.tokens});
  return sum(SharedRows({p.tickets + kSumTicket, p.tokens, warps, true}));
}

// Roles: end -------------------------------------------------------------------------------------

/// How many frames have passed; the last block.
__device__ void advance_rings(const Params& p, const BlockShared& s, Epoch n) {
  const Context& c = p.context;
  for (int peer = threadIdx.x; peer < c.size; peer += blockDim.x)
    if (peer != c.rank)
      advance(c, p.shape.slots.ring, s, peer, p.pull ? 0 : s.rows_from(c, p.routing, peer),
              offer_of(p, peer, n).pull != 0 ? 0 : s.rows_to(p.routing, peer));
}

/// Gives pool rows back to the senders; the last block. When peers have read them here, first waits
/// until all have granted this epoch.
__device__ void release_pool(const Params& p, const Direction<KernelAccess>& lane, Epoch n) {
  const Context& c = p.context;
  bool good = true;
  for (int peer = threadIdx.x; p.pull && peer < c.size && good; peer += blockDim.x)
    good = wait_until(c, peer, Phase::release, n, [&] { return lane.has_read(peer, n); });
  if (!__syncthreads_and(good) || p.release == nullptr) return;
  const DirectionSlots& place = p.shape.slots.dispatch;
  for (int peer = threadIdx.x; peer < c.size; peer += blockDim.x) grant(c, peer, place, *p.release);
}

/// What a block does once it may: pushes what it has to, and sums. False if a wait was given up.
template <class Element, class Layout>
__device__ __forceinline__ bool work(const Params& p, BlockShared& s, Epoch n) {
  const Context& c = p.context;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  bool good = true;
  if (!p.pull && warp < p.pushers && static_cast<int>(blockIdx.x) < writing_blocks(c)) {
    let_bulk_copies_see();  // credit, behind which they write
    if constexpr (Layout::kGrouped)
      good = push_sums<Element>(p, s, warp);
    else
      good = push_rows(p, s, warp);
    mark(c, kSent);
  }
  if (blockIdx.x == 0 && warp == kHighThroughputWarps - 1)
    good = compare_calls(saying(p, n), [](int) { return true; });  // offers come from all
  // One of the warps that only sum announces first.
  if (!p.pull && warp == kHighThroughputWarps - 2 && is_last_block(c)) announce_rows(p, s);
  return good && sum_tokens<Element, Layout>(p, s, warp, n);
}

template <class Element, class Layout>
__device__ void run(const Params& p, BlockShared& s) {
  const Context& c = p.context;
  const auto lane = direction(c, p.shape.slots.combine);
  start(p);
  const Peeked peeked = peek(c, lane);
  take_routing(c, p.routing, p.shape.slots.ring, peeked, direction(c, p.shape.slots.dispatch), s);
  if (stops(c, Phase::credit)) return;
  const bool carries = is_courier(c);
  const Entry entry = carries ? carry_along(c, lane, p.shape.slots.combine, /*of_receive=*/true)
                              : admit(c, lane, peeked);
  if (!entry.usable || stops(c, Phase::counts)) return;
  const Epoch n = entry.send;
  mark(c, kAdmitted);
  if (blockIdx.x == 0) send_offers(p, n);
  if (stops(c, Phase::combine_rows)) return;
  const bool good = carries || work<Element, Layout>(p, s, n);
  if (!__syncthreads_and(good) || stops(c, Phase::release)) return;
  mark(c, kReceived);
  if (leave_receive(c, lane, p.shape.slots.combine, n, false, true)) {
    return_tickets(p.tickets);
    advance_rings(p, s, n);
    release_pool(p, lane, n);
  }
  mark(c, kEnded);
}

}  // namespace

// Kernel -----------------------------------------------------------------------------------------

namespace high_throughput {

template <class Element, class Layout>
__global__ void __launch_bounds__(kHighThroughputWarps * 32, 1)
    combine(const __grid_constant__ HighThroughputCombineParams p) {
  extern __shared__ __align__(128) std::byte memory[];
  run<Element, Layout>(p, *reinterpret_cast<BlockShared*>(memory));
}

}  // namespace high_throughput

// Launch -----------------------------------------------------------------------------------------

cudaError_t launch(const HighThroughputCombineParams& params, const HighThroughputLaunch& launch) {
  return with_element(params.shape.dtype, [&](auto element) {
    return with_layout(params.grouped, [&](auto layout) {
      high_throughput::combine<decltype(element), decltype(layout)>
          <<<launch.blocks + params.context.couriers, kHighThroughputWarps * 32,
             shared_bytes(params.summing.bulk), launch.stream>>>(params);
      return cudaGetLastError();
    });
  });
}

cudaError_t prepare_high_throughput_combine(bool bulk) {
  return for_each_element([&](auto element) {
    return for_each_layout([&](auto layout) {
      return cudaFuncSetAttribute(high_throughput::combine<decltype(element), decltype(layout)>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared_bytes(bulk)));
    });
  });
}

}  // namespace expertwire::ep::cuda
