// High-throughput dispatch: every row is read once and written to its final place in the pool of
// each of its ranks.
//
// Roles. Sender warps share out the tokens while they work, in large batches if rows stay in the
// pool, else a few at a time, so that the first chunks are complete first. A sender's lane i has
// the token's i-th destination: it starts that store, waits for it, counts it and releases the
// chunk's flag. Receiver warps wait for chunks; if the caller owns the output they copy row after
// row out of the pool.
//
// Who writes what. A row of a pool has one writer, the source whose range it lies in. A chunk's
// flag is released by whichever lane of the source counts the chunk's last piece. Own rows go
// straight to the output.
//
// Memory order. A bulk store is complete when its lane's wait_group returns; metadata stored by
// other lanes is ordered by __syncwarp; then an acq_rel count, and the last one's release at system
// scope. Receivers acquire the flag. notify has acquired all credit for a new route; here it is
// acquired again, which is one load a peer, because a cached dispatch has no notify.
//
// Cost. Reads T rows, writes T * (distinct ranks) rows; owned: the rows of other ranks once more. A
// warp has two pieces in flight or more; one count for each (warp, rank, chunk), or for each batch
// if rows are awaited.

#include "ep/cuda/high_throughput/block.cuh"

namespace expertwire::inline v0::ep::cuda {

// Config -----------------------------------------------------------------------------------------

namespace {

// Params -----------------------------------------------------------------------------------------

using Params = HighThroughputDispatchParams;

/// Where one row goes, with what belongs to it.
struct RowPlace {
  std::byte* x;
  std::int32_t* token;
  std::int32_t* experts;
  float* weights;
  float* scales;
};

/// Rows side by side: where the first is. A pool's are at offsets of its owner's lane.
struct Rows {
  std::uint64_t x, tokens, experts, weights, scales;

  __device__ __forceinline__ static Rows of_pool(const Params& p, Epoch n) {
    const HighThroughputSlots& slots = p.shape.slots;
    return {slots.pool_row_of(n, 0, 0), slots.pool_token_of(n, 0), slots.pool_experts_of(n, 0),
            slots.pool_weights_of(n, 0), slots.pool_scales_of(n, 0)};
  }
  __device__ __forceinline__ RowPlace at(const Params& p, std::byte* base,
                                         std::uint32_t row) const {
    const auto top_k = static_cast<std::uint32_t>(p.shape.top_k);
    constexpr std::uint64_t kWord = 4;
    return {base + x + static_cast<std::uint64_t>(row) * p.format.data_bytes,
            reinterpret_cast<std::int32_t*>(base + tokens + row * kWord),
            reinterpret_cast<std::int32_t*>(base + experts + row * kWord * top_k),
            reinterpret_cast<float*>(base + weights + row * kWord * top_k),
            reinterpret_cast<float*>(base + scales + row * kWord * p.format.scales)};
  }
};

__device__ __forceinline__ RowPlace output_place(const Params& p, std::uint32_t row) {
  const std::uint64_t entry =
      static_cast<std::uint64_t>(row) * static_cast<std::uint32_t>(p.shape.top_k);
  return {p.out_x + static_cast<std::uint64_t>(row) * p.format.data_bytes, p.out_tokens + row,
          p.out_experts + entry, p.out_weights + entry,
          p.out_scales + static_cast<std::uint64_t>(row) * p.format.scales};
}

/// What lies beside a row, a part of it on each lane of a warp: asked for early, written late.
struct Beside {
  static constexpr int kScales = 4;
  std::int32_t token = 0, expert = -1;
  float weight = 0, scales[kScales] = {};

  __device__ __forceinline__ void load_scales(const Params& p, const float* from) {
    const int lane = static_cast<int>(threadIdx.x) % 32, count = static_cast<int>(p.format.scales);
#pragma unroll
    for (int i = 0; i < kScales; ++i)
      if (lane + 32 * i < count) scales[i] = from[lane + 32 * i];
  }
  /// `from` has the scales that are too many to be held.
  __device__ __forceinline__ void write(const Params& p, const RowPlace& to,
                                        const float* from) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, count = static_cast<int>(p.format.scales);
    if (lane == 0) *to.token = token;
    if (lane < p.shape.top_k) {
      to.experts[lane] = expert;
      to.weights[lane] = weight;
    }
#pragma unroll
    for (int i = 0; i < kScales; ++i)
      if (lane + 32 * i < count) to.scales[lane + 32 * i] = scales[i];
#pragma unroll 1
    for (int i = lane + 32 * kScales; i < count; i += 32) to.scales[i] = from[i];
  }
};

// Roles: sender ----------------------------------------------------------------------------------

/// Where a token goes, a destination a lane, and what goes with it.
struct Outgoing {
  Destination to{-1, -1};
  Beside beside;

  __device__ __forceinline__ void load(const Params& p, int token) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    to = {-1, -1};
    if (lane < p.shape.width)
      to = p.routing.destinations[static_cast<std::int64_t>(token) * p.shape.width + lane];
    const std::int64_t i = static_cast<std::int64_t>(token) * p.shape.top_k + lane;
    const bool mine = lane < p.shape.top_k;
    beside.token = token;
    beside.expert = mine ? p.routing.experts[i] : -1;
    beside.weight = mine && p.topk_weights != nullptr ? p.topk_weights[i] : 0.0F;
    beside.load_scales(p, scales(p));
  }
  __device__ __forceinline__ const float* scales(const Params& p) const {
    return p.x_scales + static_cast<std::int64_t>(beside.token) * p.format.scales;
  }
  /// Writes what goes beside the row at `rank`; one warp.
  __device__ __forceinline__ void write(const Params& p, const RowPlace& place, int rank) const {
    Beside there = beside;
    const bool here = beside.expert >= 0 && p.shape.placement.rank_of(beside.expert) == rank;
    there.expert = here ? p.shape.placement.local_index(beside.expert) : -1;
    there.weight = here ? beside.weight : 0.0F;
    there.write(p, place, scales(p));
  }
};

__device__ void send_rows(const Params& p, BlockShared& s, int warp, Epoch n) {
  const Context& c = p.context;
  const HighThroughputSlots& slots = p.shape.slots;
  const int width = p.shape.width, pieces = p.moving.pieces;
  const Rows pool = Rows::of_pool(p, n);
  SharedRows tokens(
      {p.tickets, p.tokens, p.senders * static_cast<int>(gridDim.x), p.moving.awaited});
  Outgoing token;
  auto ready = [&](int row) { return tokens.take(row); };
  auto look = [&](int row) { token.load(p, tokens.at(row)); };
  auto piece = [&](const Cursor& at) {
    return piece_of(p.moving,
                    p.x + static_cast<std::uint64_t>(tokens.at(at.row)) * p.format.data_bytes,
                    p.format.data_bytes, at);
  };
  auto place_of = [&](int rank, std::uint32_t row) {
    const bool direct = p.out_x != nullptr && rank == c.rank;
    return direct ? output_place(p, row) : pool.at(p, there<std::byte>(c, rank, 0), row);
  };
  auto land = [&](const Cursor& at) -> Landing {
    const Destination to = token.to;
    Landing landing{nullptr, to.rank, to.row};
    std::uint32_t row = 0;
    bool fits = false;
    if (to.rank >= 0) {
      const Run run = s.run_at(to.rank);
      row = run.place(static_cast<std::uint32_t>(to.row));
      fits = run.has_room(static_cast<std::uint32_t>(to.row));
      if (fits) landing.to = place_of(to.rank, row).x + offset_of(p.moving, at);
    }
    if (at.piece != 0) return landing;
#pragma unroll 1
    for (unsigned rest = __ballot_sync(kAllLanes, fits); rest != 0; rest &= rest - 1) {
      const int from = __ffs(static_cast<int>(rest)) - 1;
      const int rank = __shfl_sync(kAllLanes, to.rank, from);
      token.write(p, place_of(rank, __shfl_sync(kAllLanes, row, from)), rank);
    }
    return landing;
  };
  ChunkTally tally;
  auto close = [&](int rank, int chunk, std::uint32_t count) {
    if (rank == c.rank) return;  // own rows are there at the end of the kernel
    count_pieces(&p.chunk_rows[rank * slots.chunks() + chunk],
                 outbox<Epoch>(c, rank, slots.row_flag_of(n, chunk)), chunk, count,
                 p.routing.rows_to[rank], pieces, n);
  };
  auto done = [&](const Cursor& at, const Landing& landing) {
    tally.add(landing, width, close);
    if (p.moving.awaited && at.piece == pieces - 1 && tokens.closes(at.row)) tally.close_all(close);
  };
  move_rows(ring_of(s, p.moving, warp, 1), p.moving, Moves{ready, piece, look, land, done});
  tally.close_all(close);
}

// Roles: caller ----------------------------------------------------------------------------------

/// Ranks whose routing is an earlier dispatch's tell each other which; one warp of the first block.
__device__ __noinline__ bool exchange_calls(const Params& p, Epoch n) {
  if ((p.call.options & Call::kCached) == 0) return true;  // notify has
  const Saying saying{p.context, p.shape.slots.dispatch, n, p.call, *p.routing.epoch};
  tell_call(saying, static_cast<int>(threadIdx.x) % 32, 32);
  return compare_calls(saying, [&](int source) { return p.routing.rows_from[source] > 0; });
}

// Roles: receiver --------------------------------------------------------------------------------

__device__ __forceinline__ int receivers_of(const Params& p) {
  return kHighThroughputWarps - p.senders;
}

/// Waits for a chunk of a source; one thread.
__device__ bool await_chunk(const Params& p, int source, int chunk, Epoch n) {
  const Context& c = p.context;
  const auto* flag = inbox<Epoch>(c, source, p.shape.slots.row_flag_of(n, chunk));
  return wait_until(c, source, Phase::dispatch_rows, static_cast<std::uint64_t>(chunk) * kChunk,
                    [&] { return arrived<KernelAccess>(flag, n); });
}

/// The pool is the output: only waits for rows.
__device__ bool await_rows(const Params& p, int warp, Epoch n) {
  const Context& c = p.context;
  const int thread = (warp * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x)) * 32 +
                     static_cast<int>(threadIdx.x) % 32;
  const int threads = receivers_of(p) * static_cast<int>(gridDim.x) * 32;
  bool good = true;
  for (int i = 1; i < c.size && good; ++i) {
    const int source = (c.rank + i) % c.size, rows = p.routing.rows_from[source];
    for (int chunk = thread; chunk * kChunk < rows && good; chunk += threads)
      good = await_chunk(p, source, chunk, n);
  }
  return __all_sync(kAllLanes, good);
}

/// Copies rows of other ranks out of the pool as they arrive; one warp. It takes every `stride`-th
/// row of a source, so that all warps work on the chunks that come first.
__device__ bool take_rows(const Params& p, BlockShared& s, int warp, Epoch n) {
  const Context& c = p.context;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int first = warp * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
  const int stride = receivers_of(p) * static_cast<int>(gridDim.x);
  const Rows pool = Rows::of_pool(p, n);
  bool good = true;
  // Where the next row is; the rows of the last pieces are remembered by lanes.
  int source = 0, row = first - stride, known = -1;
  std::uint32_t held = 0;
  auto next_row = [&]() -> bool {
    row += stride;
    while (source == 0 || row >= p.routing.rows_from[(c.rank + source) % c.size]) {
      if (++source >= c.size) return false;
      row = first;
      known = -1;
    }
    return true;
  };
  auto ready = [&](int i) {
    Run run{};
    do {  // rows past the capacity are left where they are
      if (!next_row()) return false;
      run = s.run_from(c, p.routing, (c.rank + source) % c.size);
    } while (!run.has_room(static_cast<std::uint32_t>(row)));
    const int rank = (c.rank + source) % c.size;
    if (row / kChunk != known) {
      if (lane == 0) good = await_chunk(p, rank, row / kChunk, n);
      __syncwarp();  // what lane 0 acquired, all may read
      good = __all_sync(kAllLanes, good);
      let_bulk_copies_see();
    }
    known = row / kChunk;
    if (lane == i % 32) held = run.place(static_cast<std::uint32_t>(row));
    return good;
  };
  auto place_of = [&](int i) {
    return pool.at(p, there<std::byte>(c, c.rank, 0), __shfl_sync(kAllLanes, held, i % 32));
  };
  auto piece = [&](const Cursor& at) {
    return piece_of(p.moving, place_of(at.row).x, p.format.data_bytes, at);
  };
  Beside beside;
  auto look = [&](int i) {
    const RowPlace from = place_of(i);
    beside.token = *from.token;
    if (lane < p.shape.top_k) {
      beside.expert = from.experts[lane];
      beside.weight = from.weights[lane];
    }
    beside.load_scales(p, from.scales);
  };
  auto land = [&](const Cursor& at) -> Landing {
    const RowPlace to = output_place(p, __shfl_sync(kAllLanes, held, at.row % 32));
    if (at.piece == 0) beside.write(p, to, place_of(at.row).scales);
    return {lane == 0 ? to.x + offset_of(p.moving, at) : nullptr, -1, -1};
  };
  auto done = [](const Cursor&, const Landing&) {};
  move_rows(ring_of(s, p.moving, p.senders + warp, 1), p.moving,
            Moves{ready, piece, look, land, done});
  return good;
}

}  // namespace

// Kernel -----------------------------------------------------------------------------------------

namespace high_throughput {

__global__ void __launch_bounds__(kHighThroughputWarps * 32, 1)
    dispatch(const __grid_constant__ HighThroughputDispatchParams p) {
  extern __shared__ __align__(128) std::byte memory[];
  BlockShared& s = *reinterpret_cast<BlockShared*>(memory);
  const Context& c = p.context;
  const auto lane = direction(c, p.shape.slots.dispatch);
  start(p);
  const Peeked peeked = peek(c, lane);
  take_routing(c, p.routing, s);
  const Entry entry = admit(c, lane, peeked);
  if (!entry.usable || stops(c, Phase::dispatch_rows)) return;
  const Epoch n = entry.send;
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.epoch = n;
  mark(c, kAdmitted);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  bool good = true;
  if (blockIdx.x == 0 && warp == p.senders) good = exchange_calls(p, n);
  if (s.overflow) {
    // Nothing is sent, on any rank; the epoch ends all the same.
  } else if (warp < p.senders) {
    let_bulk_copies_see();  // credit, behind which they write
    send_rows(p, s, warp, n);
    mark(c, kSent);
  } else if (good) {
    good = p.out_x == nullptr ? await_rows(p, warp - p.senders, n)
                              : take_rows(p, s, warp - p.senders, n);
  }
  if (!__syncthreads_and(good) || stops(c, Phase::release)) return;
  mark(c, kReceived);
  if (leave_receive(c, lane, p.shape.slots.dispatch, n, p.keep, true)) return_tickets(p.tickets);
  mark(c, kEnded);
}

}  // namespace high_throughput

// Launch -----------------------------------------------------------------------------------------

cudaError_t launch(const HighThroughputDispatchParams& params, const HighThroughputLaunch& launch) {
  high_throughput::dispatch<<<launch.blocks, kHighThroughputWarps * 32,
                              shared_bytes(params.moving.bulk), launch.stream>>>(params);
  return cudaGetLastError();
}

cudaError_t prepare_high_throughput_dispatch(bool bulk) {
  return cudaFuncSetAttribute(high_throughput::dispatch,
                              cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(shared_bytes(bulk)));
}

}  // namespace expertwire::ep::cuda
