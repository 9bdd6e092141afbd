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

#include "ep/cuda/high_throughput_block.cuh"

namespace expertwire::ep::cuda {

// Config -----------------------------------------------------------------------------------------

namespace {

constexpr int kSenders = kHighThroughputSenders;
constexpr int kReceivers = kHighThroughputWarps - kSenders;

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

__device__ RowPlace pool_place(const Params& p, int owner, Epoch n, std::int64_t row) {
  const Context& c = p.context;
  const HighThroughputSlots& slots = p.shape.slots;
  return {at<std::byte>(c, owner, slots.pool_row_of(n, row, p.format.data_bytes)),
          at<std::int32_t>(c, owner, slots.pool_token_of(n, row)),
          at<std::int32_t>(c, owner, slots.pool_experts_of(n, row)),
          at<float>(c, owner, slots.pool_weights_of(n, row)),
          at<float>(c, owner, slots.pool_scales_of(n, row))};
}

__device__ RowPlace output_place(const Params& p, std::int64_t row) {
  return {p.out_x + row * p.format.data_bytes, p.out_tokens + row,
          p.out_experts + row * p.shape.top_k, p.out_weights + row * p.shape.top_k,
          p.out_scales + row * p.format.scales};
}

// Roles: sender ----------------------------------------------------------------------------------

/// Writes what goes beside a row, for the destination of lane `from`; one warp.
__device__ void send_metadata(const Params& p, const RowPlace& place, int token, int rank) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane == 0) *place.token = token;
  for (int s = lane; s < static_cast<int>(p.format.scales); s += 32)
    place.scales[s] = p.x_scales[static_cast<std::int64_t>(token) * p.format.scales + s];
  if (lane >= p.shape.top_k) return;
  const std::int64_t i = static_cast<std::int64_t>(token) * p.shape.top_k + lane;
  const std::int32_t expert = p.routing.experts[i];
  const bool here = expert >= 0 && p.shape.placement.rank_of(expert) == rank;
  place.experts[lane] = here ? p.shape.placement.local_index(expert) : -1;
  place.weights[lane] = here && p.topk_weights != nullptr ? p.topk_weights[i] : 0.0F;
}

__device__ void send_rows(const Params& p, BlockShared& s, int warp, Epoch n) {
  const Context& c = p.context;
  const HighThroughputSlots& slots = p.shape.slots;
  const int lane = static_cast<int>(threadIdx.x) % 32, width = p.shape.width;
  const std::uint64_t row_bytes = p.format.data_bytes;
  const int pieces = pieces_of(row_bytes, p.moving);
  SharedRows tokens(
      {p.tickets, p.tokens, kSenders * static_cast<int>(gridDim.x), p.moving.awaited});

  auto ready = [&](int i) { return i % pieces != 0 || tokens.take(i / pieces); };
  auto piece = [&](int i) -> Piece {
    const std::uint64_t offset = static_cast<std::uint64_t>(i % pieces) * p.moving.piece_bytes;
    const std::uint64_t left = row_bytes - offset;
    return {
        p.x + static_cast<std::uint64_t>(tokens.at(i / pieces)) * row_bytes + offset,
        static_cast<std::uint32_t>(min(left, static_cast<std::uint64_t>(p.moving.piece_bytes)))};
  };
  auto place_of = [&](int rank, std::int64_t row) {
    const bool direct = p.out_x != nullptr && rank == c.rank;
    return direct ? output_place(p, row) : pool_place(p, rank, n, row);
  };
  auto land = [&](int i) -> Landing {
    const int token = tokens.at(i / pieces);
    Destination to{-1, -1};
    if (lane < width) to = p.routing.destinations[static_cast<std::int64_t>(token) * width + lane];
    Landing landing{nullptr, to.rank, to.row};
    std::int64_t row = 0;
    bool fits = false;
    if (to.rank >= 0) {
      row = static_cast<std::int64_t>(s.first_at[to.rank]) + to.row;
      fits = row < s.capacity[to.rank];
      if (fits)
        landing.to = place_of(to.rank, row).x +
                     static_cast<std::uint64_t>(i % pieces) * p.moving.piece_bytes;
    }
    if (i % pieces != 0) return landing;
    for (unsigned rest = __ballot_sync(kAllLanes, fits); rest != 0; rest &= rest - 1) {
      const int from = __ffs(static_cast<int>(rest)) - 1;
      const int rank = __shfl_sync(kAllLanes, to.rank, from);
      const std::int64_t at_row = __shfl_sync(kAllLanes, row, from);
      send_metadata(p, place_of(rank, at_row), token, rank);
    }
    return landing;
  };
  ChunkTally tally;
  auto close = [&](int rank, int chunk, std::uint32_t count) {
    if (rank == c.rank) return;  // own rows are there at the end of the kernel
    count_pieces(&p.chunk_rows[rank * slots.chunks() + chunk],
                 at<Epoch>(c, rank, slots.row_flag_of(n, c.rank, chunk)), chunk, count,
                 p.routing.rows_to[rank], pieces, n);
  };
  auto done = [&](int i, const Landing& landing) {
    tally.add(landing, width, close);
    if (p.moving.awaited && i % pieces == pieces - 1 && tokens.closes(i / pieces))
      tally.close_all(close);
  };
  move_pieces(ring_of(s, p.moving, warp, 1), p.moving.bulk, ready, piece, land, done);
  tally.close_all(close);
}

// Roles: receiver --------------------------------------------------------------------------------

/// Waits for a chunk of a source; one thread.
__device__ bool await_chunk(const Params& p, int source, int chunk, Epoch n) {
  const Context& c = p.context;
  const auto* flag = at<Epoch>(c, c.rank, p.shape.slots.row_flag_of(n, source, chunk));
  return wait_until(c, source, Phase::dispatch_rows, static_cast<std::uint64_t>(chunk) * kChunk,
                    [&] { return arrived<KernelAccess>(flag, n); });
}

/// The pool is the output: only waits for rows.
__device__ bool await_rows(const Params& p, int warp, Epoch n) {
  const Context& c = p.context;
  const int thread = (warp * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x)) * 32 +
                     static_cast<int>(threadIdx.x) % 32;
  const int threads = kReceivers * static_cast<int>(gridDim.x) * 32;
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
  const int stride = kReceivers * static_cast<int>(gridDim.x);
  const std::uint64_t row_bytes = p.format.data_bytes;
  const int pieces = pieces_of(row_bytes, p.moving);
  bool good = true;
  // Where the next row is; the rows of the last pieces are remembered by lanes.
  int source = 0, row = first - stride, known = -1;
  std::int64_t held = 0;
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
    if (i % pieces != 0) return true;
    std::int64_t at_row = 0;
    do {  // rows past the capacity are left where they are
      if (!next_row()) return false;
      const int rank = (c.rank + source) % c.size;
      at_row = static_cast<std::int64_t>(p.routing.first_from[rank]) + row;
    } while (at_row >= s.capacity[c.rank]);
    const int rank = (c.rank + source) % c.size;
    if (row / kChunk != known) {
      if (lane == 0) good = await_chunk(p, rank, row / kChunk, n);
      __syncwarp();  // what lane 0 acquired, all may read
      good = __all_sync(kAllLanes, good);
      let_bulk_copies_see();
    }
    known = row / kChunk;
    if (lane == i / pieces % 32) held = at_row;
    return good;
  };
  auto row_of = [&](int i) { return __shfl_sync(kAllLanes, held, i / pieces % 32); };
  auto offset_of = [&](int i) {
    return static_cast<std::uint64_t>(i % pieces) * p.moving.piece_bytes;
  };
  auto piece = [&](int i) -> Piece {
    const std::uint64_t left = row_bytes - offset_of(i);
    return {
        pool_place(p, c.rank, n, row_of(i)).x + offset_of(i),
        static_cast<std::uint32_t>(min(left, static_cast<std::uint64_t>(p.moving.piece_bytes)))};
  };
  auto land = [&](int i) -> Landing {
    const std::int64_t at_row = row_of(i);
    const RowPlace from = pool_place(p, c.rank, n, at_row), to = output_place(p, at_row);
    if (i % pieces == 0) {
      if (lane == 0) *to.token = *from.token;
      for (int k = lane; k < static_cast<int>(p.format.scales); k += 32)
        to.scales[k] = from.scales[k];
      if (lane < p.shape.top_k) {
        to.experts[lane] = from.experts[lane];
        to.weights[lane] = from.weights[lane];
      }
    }
    return {lane == 0 ? to.x + offset_of(i) : nullptr, -1, -1};
  };
  move_pieces(ring_of(s, p.moving, kSenders + warp, 1), p.moving.bulk, ready, piece, land,
              [](int, const Landing&) {});
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
  const Epoch credit = peek_credit(c, lane);
  take_routing(c, p.routing, s);
  const Entry entry = enter(c, lane);
  if (!entry.usable) return;
  const Epoch n = entry.send;
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.epoch = n;
  if (!await_credits(c, lane, n, credit) || stops(c, Phase::dispatch_rows)) return;
  mark(c, kAdmitted);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  bool good = true;
  if (s.overflow) {
    // Nothing is sent, on any rank; the epoch ends all the same.
  } else if (warp < kSenders) {
    send_rows(p, s, warp, n);
    mark(c, kSent);
  } else {
    good = p.out_x == nullptr ? await_rows(p, warp - kSenders, n)
                              : take_rows(p, s, warp - kSenders, n);
  }
  if (!__syncthreads_and(good) || stops(c, Phase::release)) return;
  mark(c, kReceived);
  if (leave_receive(c, lane, p.shape.slots.dispatch, n, p.keep, true)) return_tickets(p.tickets);
  mark(c, kEnded);
}

}  // namespace high_throughput

// Launch -----------------------------------------------------------------------------------------

Moving plan_moving(const MovingRequest& r) {
  Moving moving{static_cast<std::uint32_t>(r.row_bytes), r.stages, r.warps, r.bulk, r.awaited};
  if (!r.bulk) return moving;
  constexpr std::uint64_t kVector = 16;
  const std::uint64_t most =
      kRingBytes / static_cast<std::uint64_t>(r.warps * r.stages * r.parts) / kVector * kVector;
  const std::uint64_t pieces = (r.row_bytes + most - 1) / most;
  moving.piece_bytes =
      static_cast<std::uint32_t>(align_up((r.row_bytes + pieces - 1) / pieces, kVector));
  return moving;
}

cudaError_t launch(const HighThroughputDispatchParams& params, const HighThroughputLaunch& launch) {
  high_throughput::dispatch<<<launch.blocks, kHighThroughputWarps * 32, shared_bytes(params.moving),
                              launch.stream>>>(params);
  return cudaGetLastError();
}

cudaError_t prepare_high_throughput_dispatch(bool bulk) {
  return cudaFuncSetAttribute(high_throughput::dispatch,
                              cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(shared_bytes({0, 0, 0, bulk, false})));
}

}  // namespace expertwire::ep::cuda
