// High-throughput combine: the row that each rank made of a token comes home, and the rows of a
// token are added in ascending order of rank.
//
// Roles. The first block tells every rank where this one's rows will be: in its pool, where peers
// read them (pull), or pushed into slots of theirs. Pushing warps, half of a block, write rows to
// their sources, a few at a time and in order, and then sum as the others do. A summing warp holds
// the rows of a token side by side in stages of its ring, the next pieces on their way while one is
// added.
//
// Who writes what. A pair is written by one rank, that of the experts; a token of
// the output by one warp. A chunk's flag is released by the lane that counts its last piece.
//
// Memory order. Pull: the rows were written before this kernel, on this stream; they are released
// by the offer's flag. Push: as in dispatch. Whoever acquires a flag and reads by the copy engine
// puts a proxy fence between. Pool rows that peers read go back to the senders only when every peer
// has granted this epoch, which it does after its last read.
//
// Cost. Pull: the rows of a token cross the wire once, as reads. Push: once as writes, and are read
// again here.

#include "ep/cuda/high_throughput/block.cuh"

namespace expertwire::inline v0::ep::cuda {

// Config -----------------------------------------------------------------------------------------

namespace {

constexpr int kPushers = kHighThroughputWarps / 2;

// Params -----------------------------------------------------------------------------------------

using Params = HighThroughputCombineParams;

// Roles: offers ----------------------------------------------------------------------------------

__device__ __forceinline__ Saying saying(const Params& p, Epoch n) {
  return {p.context, p.shape.slots.combine, n, p.call, *p.epoch};
}

/// Weights go home, then the offer to every rank; the first block.
__device__ void send_offers(const Params& p, const BlockShared& s, Epoch n) {
  const Context& c = p.context;
  const HighThroughputSlots& slots = p.shape.slots;
  const int top_k = p.shape.top_k;
  for (int source = 0; p.topk_weights != nullptr && source < c.size; ++source) {
    const Run run = s.run_from(c, p.routing, source);
    const auto rows =
        static_cast<int>(run.fitting(static_cast<std::uint32_t>(p.routing.rows_from[source])));
    float* home = outbox<float>(c, source, slots.partial_weights_of(n, 0));
    const float* mine = p.topk_weights + static_cast<std::int64_t>(run.first) * top_k;
    for (int i = threadIdx.x; i < rows * top_k; i += blockDim.x) home[i] = mine[i];
  }
  const CombineOffer offer{p.pull ? 1 : 0, p.topk_weights != nullptr ? 1 : 0};
  for (int peer = threadIdx.x; peer < c.size; peer += blockDim.x)
    *outbox<CombineOffer>(c, peer, slots.offer_of(n)) = offer;
  tell_call(saying(p, n), static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
  __syncthreads();
  for (int peer = threadIdx.x; peer < c.size; peer += blockDim.x)
    announce(c, peer, slots.offer_flag_of(n), n);
}

/// One warp.
__device__ bool await_offers(const Params& p, Epoch n) {
  const Context& c = p.context;
  bool good = true;
  for (int peer = static_cast<int>(threadIdx.x) % 32; peer < c.size && good; peer += 32) {
    const auto* flag = inbox<Epoch>(c, peer, p.shape.slots.offer_flag_of(n));
    good = wait_until(c, peer, Phase::counts, n, [&] { return arrived<KernelAccess>(flag, n); });
  }
  __syncwarp();  // what one lane acquired, all may read
  return __all_sync(kAllLanes, good);
}

__device__ __forceinline__ CombineOffer offer_of(const Params& p, int rank, Epoch n) {
  return *inbox<CombineOffer>(p.context, rank, p.shape.slots.offer_of(n));
}

// Roles: pusher ----------------------------------------------------------------------------------

/// A row that goes home: `row` of those that `source` sent here.
struct HomeRow {
  int source;
  int row;
};

/// The rows of all other ranks one behind the other; every rank begins with another one.
__device__ __forceinline__ HomeRow home_row(const Params& p, int item) {
  const Context& c = p.context;
  int i = 1;
  for (;; ++i) {
    const int source = (c.rank + i) % c.size, rows = p.routing.rows_from[source];
    if (item < rows || i == c.size - 1) return {source, item};
    item -= rows;
  }
}

/// Writes rows to the ranks that they came from.
__device__ void push_rows(const Params& p, BlockShared& s, int warp, Epoch n) {
  const Context& c = p.context;
  const HighThroughputSlots& slots = p.shape.slots;
  const bool first_lane = threadIdx.x % 32 == 0;
  const Moving& moving = p.pushing;
  const auto row_bytes = static_cast<std::uint32_t>(slots.sizes.row_bytes);
  const int all = p.routing.first_from[c.size] - p.routing.rows_from[c.rank];
  SharedRows items({p.tickets, all, kPushers * static_cast<int>(gridDim.x), moving.awaited});
  auto in_y = [&](const HomeRow& home) { return s.run_from(c, p.routing, home.source); };
  auto slot_of_home = [&](const HomeRow& home) {
    return outbox<std::byte>(c, home.source, slots.partial_of(n, home.row));
  };
  auto ready = [&](int row) { return items.take(row); };
  auto look = [](int) {};
  auto piece = [&](const Cursor& at) -> Piece {
    // A row past the capacity does not exist: nothing is read for it, and it is only counted.
    const HomeRow home = home_row(p, items.at(at.row));
    const Run run = in_y(home);
    const auto row = static_cast<std::uint32_t>(home.row);
    Piece piece = piece_of(moving, p.y + std::uint64_t{run.place(row)} * row_bytes, row_bytes, at);
    if (!run.has_room(row)) piece.bytes = 0;
    return piece;
  };
  auto land = [&](const Cursor& at) -> Landing {
    const HomeRow home = home_row(p, items.at(at.row));
    if (!first_lane) return {};
    Landing landing{nullptr, home.source, home.row};
    if (in_y(home).has_room(static_cast<std::uint32_t>(home.row)))
      landing.to = slot_of_home(home) + offset_of(moving, at);
    return landing;
  };
  ChunkTally tally;
  auto close = [&](int source, int chunk, std::uint32_t written) {
    count_pieces(&p.chunk_rows[source * slots.chunks() + chunk],
                 outbox<Epoch>(c, source, slots.partial_flag_of(n, chunk)), chunk, written,
                 p.routing.rows_from[source], moving.pieces, n);
  };
  auto done = [&](const Cursor& at, const Landing& landing) {
    tally.add(landing, 1, close);
    if (moving.awaited && at.piece == moving.pieces - 1 && items.closes(at.row))
      tally.close_all(close);
  };
  const Ring ring = ring_of(s, moving, warp, 1);
  move_rows(ring, moving, Moves{ready, piece, look, land, done});
  if (has_bulk_copies() && moving.bulk) {
    if (first_lane) ring.end();  // the warp will sum, with a ring of another form
    __syncwarp();
  }
  tally.close_all(close);
}

// Roles: summer ----------------------------------------------------------------------------------

/// The tokens of one warp and where their rows are.
struct Summer {
  const Params& p;
  BlockShared& s;
  Epoch n, dispatched;  // epochs of this combine, and of the dispatch whose pool rows are read

  __device__ Destination destination(int token, int lane) const {
    Destination from{-1, -1};
    if (lane < p.shape.width)
      from = p.routing.destinations[static_cast<std::int64_t>(token) * p.shape.width + lane];
    if (from.rank >= 0 && !s.run_at(from.rank).has_room(static_cast<std::uint32_t>(from.row)))
      from.rank = -1;  // it had no room there, and counts as zero
    return from;
  }

  /// The row of this lane's rank for `token`, once it is there; null if there is none.
  __device__ const std::byte* find_row(int token, int lane, bool* good) const {
    const Context& c = p.context;
    const HighThroughputSlots& slots = p.shape.slots;
    const Destination from = destination(token, lane);
    if (from.rank < 0) return nullptr;
    const std::uint32_t row = s.run_at(from.rank).place(static_cast<std::uint32_t>(from.row));
    if (from.rank == c.rank) return p.y + static_cast<std::uint64_t>(row) * slots.sizes.row_bytes;
    if (offer_of(p, from.rank, n).pull != 0)
      return there<std::byte>(c, from.rank,
                              slots.pool_row_of(dispatched, row, slots.sizes.row_bytes));
    const auto* flag = inbox<Epoch>(c, from.rank, slots.partial_flag_of(n, from.row / kChunk));
    *good = wait_until(c, from.rank, Phase::combine_rows, static_cast<std::uint64_t>(from.row),
                       [&] { return arrived<KernelAccess>(flag, n); });
    return inbox<std::byte>(c, from.rank, slots.partial_of(n, from.row));
  }

  /// Writes the weights of a token that came home.
  __device__ void take_weights(int token, int lane) const {
    const HighThroughputSlots& slots = p.shape.slots;
    const Destination from = destination(token, lane);
    std::int32_t expert = -1;
    const std::int64_t i = static_cast<std::int64_t>(token) * p.shape.top_k + lane;
    if (lane < p.shape.top_k) expert = p.routing.experts[i];
    const int rank = expert >= 0 ? p.shape.placement.rank_of(expert) : -1;
    float weight = 0;
    for (int j = 0; j < p.shape.width; ++j) {
      const int other = __shfl_sync(kAllLanes, from.rank, j);
      const int row = __shfl_sync(kAllLanes, from.row, j);
      if (rank >= 0 && other == rank && offer_of(p, rank, n).weights != 0)
        weight = inbox<float>(p.context, rank, slots.partial_weights_of(n, row))[lane];
    }
    if (lane < p.shape.top_k) p.out_topk_weights[i] = weight;
  }
};

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
  const Ring ring = ring_of(w.s, p.summing, warp, p.shape.width);
  std::int32_t* held = w.s.held[warp];
  Cursor loading, summing;
  int on_way = 0;
  bool good = true, ended = false;
  const std::byte* row = nullptr;  // of the token that is being loaded, on this lane
  auto load = [&] {
    if (ended) return;
    if (loading.piece == 0) {
      ended = !rows.take(loading.row);
      if (ended) return;
      bool found = true;
      row = w.find_row(rows.at(loading.row), lane, &found);
      good = __all_sync(kAllLanes, found);
      ended = !good;
      if (ended) return;
      let_bulk_copies_see();
    }
    const unsigned present = __ballot_sync(kAllLanes, row != nullptr);
    const std::uint32_t bytes = bytes_of(p.summing, row_bytes, loading);
    if (lane == 0) {
      held[loading.stage] = __popc(present);
      device::mbarrier_expect(ring.barrier(loading), bytes * __popc(present));
    }
    __syncwarp();
    if (row != nullptr)
      device::bulk_load(
          ring.stage(loading) + __popc(present & ((1U << lane) - 1)) * p.summing.piece_bytes,
          row + offset_of(p.summing, loading), bytes, ring.barrier(loading));
    ++on_way;
    loading.step(pieces, ring.stages);
  };
  for (int s = 0; s < ring.stages; ++s) load();
#pragma unroll 1
  for (; on_way > 0; --on_way, summing.step(pieces, ring.stages)) {
    device::mbarrier_wait(ring.barrier(summing), summing.parity);
    if (!good) continue;  // loads must not outlive the block
    const int token = rows.at(summing.row);
    const std::uint64_t offset =
        static_cast<std::uint64_t>(token) * row_bytes + offset_of(p.summing, summing);
    const auto* bias =
        p.bias != nullptr ? reinterpret_cast<const uint4*>(p.bias + offset) : nullptr;
    add_stage<Element>(ring.stage(summing), p.summing.piece_bytes, held[summing.stage], bias,
                       reinterpret_cast<uint4*>(p.out + offset),
                       static_cast<int>(bytes_of(p.summing, row_bytes, summing) / sizeof(uint4)));
    if (summing.piece == 0 && p.out_topk_weights != nullptr) w.take_weights(token, lane);
    __syncwarp();
    load();
  }
  return good;
}

#endif

template <class Element, class Rows>
__device__ bool sum_by_vectors(const Summer& w, Rows& rows) {
  const Params& p = w.p;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int i = 0; rows.take(i); ++i) {
    const int token = rows.at(i);
    bool found = true;
    const std::byte* row = w.find_row(token, lane, &found);
    __syncwarp();  // what one lane acquired, all may read
    if (!__all_sync(kAllLanes, found)) return false;
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
    if (p.out_topk_weights != nullptr) w.take_weights(token, lane);
  }
  return true;
}

/// The part of one warp of the block. Pulled rows are all there: every warp has its tokens from the
/// start. Pushed ones come in order, and warps that have pushed join those that sum already.
template <class Element>
__device__ bool sum_tokens(const Params& p, BlockShared& s, int warp, Epoch n) {
  if (!await_offers(p, n)) return false;
  const Summer summer{p, s, n, *p.epoch};
  const int warps = kHighThroughputWarps * static_cast<int>(gridDim.x);
  auto sum = [&](auto rows) {
    if constexpr (has_bulk_copies()) {
      if (p.summing.bulk) return sum_by_bulk<Element>(summer, rows, warp);
    }
    return sum_by_vectors<Element>(summer, rows);
  };
  if (p.pull)
    return sum(OwnRows{warp * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x), warps,
                       p.tokens});
  return sum(SharedRows({p.tickets + kSumTicket, p.tokens, warps, true}));
}

// Roles: release ---------------------------------------------------------------------------------

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

template <class Element>
__device__ void run(const Params& p, BlockShared& s) {
  const Context& c = p.context;
  const auto lane = direction(c, p.shape.slots.combine);
  start(p);
  const Peeked peeked = peek(c, lane);
  take_routing(c, p.routing, s);
  if (stops(c, Phase::credit)) return;
  const Entry entry = admit(c, lane, peeked);
  if (!entry.usable || stops(c, Phase::counts)) return;
  const Epoch n = entry.send;
  mark(c, kAdmitted);
  if (blockIdx.x == 0) send_offers(p, s, n);
  if (stops(c, Phase::combine_rows)) return;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (!p.pull && warp < kPushers) {
    let_bulk_copies_see();  // credit, behind which they write
    push_rows(p, s, warp, n);
    mark(c, kSent);
  }
  bool good = true;
  if (blockIdx.x == 0 && warp == kHighThroughputWarps - 1)
    good = compare_calls(saying(p, n), [](int) { return true; });  // offers come from all
  good = good && sum_tokens<Element>(p, s, warp, n);
  if (!__syncthreads_and(good) || stops(c, Phase::release)) return;
  mark(c, kReceived);
  if (leave_receive(c, lane, p.shape.slots.combine, n, false, true)) {
    return_tickets(p.tickets);
    release_pool(p, lane, n);
  }
  mark(c, kEnded);
}

}  // namespace

// Kernel -----------------------------------------------------------------------------------------

namespace high_throughput {

template <class Element>
__global__ void __launch_bounds__(kHighThroughputWarps * 32, 1)
    combine(const __grid_constant__ HighThroughputCombineParams p) {
  extern __shared__ __align__(128) std::byte memory[];
  run<Element>(p, *reinterpret_cast<BlockShared*>(memory));
}

}  // namespace high_throughput

// Launch -----------------------------------------------------------------------------------------

cudaError_t launch(const HighThroughputCombineParams& params, const HighThroughputLaunch& launch) {
  return with_element(params.shape.dtype, [&](auto element) {
    high_throughput::combine<decltype(element)>
        <<<launch.blocks, kHighThroughputWarps * 32, shared_bytes(params.summing.bulk),
           launch.stream>>>(params);
    return cudaGetLastError();
  });
}

cudaError_t prepare_high_throughput_combine(bool bulk) {
  return for_each_element([&](auto element) {
    return cudaFuncSetAttribute(high_throughput::combine<decltype(element)>,
                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(shared_bytes(bulk)));
  });
}

}  // namespace expertwire::ep::cuda
