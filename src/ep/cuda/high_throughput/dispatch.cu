// High-throughput dispatch: every row is read once and written to each of its ranks: through a ring
// into the caller's output, or to its final place in a pool.
//
// Roles. Sender warps share out the tokens while they work, a few at a time, or in large batches if
// rows stay in the pool. A sender's lane i has the token's i-th destination: it waits for room in
// the ring, starts that store, waits for it, and queues it for the one warp of the grid that
// announces. Receiver warps serve the rings as rows come, and copy them to the output; with a pool
// they only wait for its chunks.
//
// Who writes what. A frame, and a row of a pool, has one writer. A chunk of a pool is announced by
// whichever lane of the source counts the chunk's last piece. Own rows go straight to the output.
//
// Memory order. A bulk store is complete when its lane's wait_group returns; metadata stored by
// other lanes is ordered by __syncwarp; then a fence for this GPU, a place in the queue, and the
// announcer's fence for all; or an acq_rel count, and the last one's release. Receivers acquire the
// flag, and give a frame back when they have used all that they read of it. Whoever acquires and
// then uses the copy engine puts a proxy fence between. notify has acquired all credit for a new
// route; here it is acquired again, which is one load a peer, because a cached dispatch has no
// notify.
//
// Cost. Reads T rows, writes T * (distinct ranks) rows; what came by rings once more. A warp has
// two pieces in flight or more; a fence for two tokens, or a count for each (warp, rank, chunk).

#include "ep/cuda/high_throughput/groups.cuh"

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
  std::int32_t* positions = nullptr;  // null where they are not asked for
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
  std::int32_t token = 0, expert = -1, position = -1;
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
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane == 0) *to.token = token;
    if (lane < p.shape.top_k) {
      to.experts[lane] = expert;
      to.weights[lane] = weight;
      if (to.positions != nullptr) to.positions[lane] = position;
    }
    write_scales(p, to.scales, from);
  }
  __device__ __forceinline__ void write_scales(const Params& p, float* to,
                                               const float* from) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, count = static_cast<int>(p.format.scales);
#pragma unroll
    for (int i = 0; i < kScales; ++i)
      if (lane + 32 * i < count) to[lane + 32 * i] = scales[i];
#pragma unroll 1
    for (int i = lane + 32 * kScales; i < count; i += 32) to[i] = from[i];
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
    if (mine && p.routing.positions != nullptr) beside.position = p.routing.positions[i];
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
  /// The same for every rank of `lanes`, whose lane knows where the row of its rank is.
  template <class PlaceOf>
  __device__ __forceinline__ void write_all(const Params& p, unsigned lanes, std::uint32_t row,
                                            PlaceOf place_of) const {
#pragma unroll 1
    for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
      const int from = __ffs(static_cast<int>(rest)) - 1;
      const int rank = __shfl_sync(kAllLanes, to.rank, from);
      write(p, place_of(rank, __shfl_sync(kAllLanes, row, from)), rank);
    }
  }
};

__device__ __forceinline__ Piece piece_of_token(const Params& p, int token, const Cursor& at) {
  const std::byte* row = p.x + static_cast<std::uint64_t>(token) * p.format.data_bytes;
  return piece_of(p.moving, row, p.format.data_bytes, at);
}

__device__ void send_to_pools(const Params& p, BlockShared& s, int warp, Epoch n) {
  const Context& c = p.context;
  const HighThroughputSlots& slots = p.shape.slots;
  const int width = p.shape.width, pieces = p.moving.pieces;
  const Rows pool = Rows::of_pool(p, n);
  SharedRows tokens({p.tickets, p.tokens, p.senders * workers(c), p.moving.awaited});
  Outgoing token;
  auto ready = [&](int row, bool) { return tokens.take(row) ? Answer::row : Answer::end; };
  auto look = [&](int row) { token.load(p, tokens.at(row)); };
  auto open = [](int, bool) { return true; };
  auto piece = [&](const Cursor& at) { return piece_of_token(p, tokens.at(at.row), at); };
  auto place_of = [&](int rank, std::uint32_t row) {
    return pool.at(p, there<std::byte>(c, rank, 0), row);
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
    if (at.piece == 0) token.write_all(p, __ballot_sync(kAllLanes, fits), row, place_of);
    return landing;
  };
  ChunkTally tally;
  auto close = [&](int rank, int chunk, std::uint32_t count) {
    if (rank == c.rank) return;  // own rows are there at the end of the kernel
    count_pieces(&p.chunk_rows[rank * slots.chunks() + chunk],
                 outbox<Epoch>(c, rank, slots.row_flag_of(n, chunk)), chunk, count,
                 p.routing.rows_to[rank], pieces, n);
  };
  auto done = [&](const Cursor&, const Landing& landing) { tally.add(landing, width, close); };
  move_rows(stages_of(s, p.moving, warp, 1), p.moving, Moves{ready, piece, look, open, land, done});
  tally.close_all(close);
}

/// What a frame holds.
template <class Layout>
__device__ __forceinline__ RowPlace place_in(const Params& p, std::byte* frame) {
  const FrameParts& parts = p.shape.slots.dispatched;
  return {frame,
          reinterpret_cast<std::int32_t*>(frame + parts.token),
          reinterpret_cast<std::int32_t*>(frame + parts.experts),
          reinterpret_cast<float*>(frame + parts.weights),
          reinterpret_cast<float*>(frame + parts.scales),
          Layout::kGrouped ? reinterpret_cast<std::int32_t*>(frame + parts.positions) : nullptr};
}

/// Writes what goes beside a row to each of its copies, and where they are to the handle, the
/// `i`-th token of `source`. `beside` has local experts.
__device__ __forceinline__ void write_copies(const Params& p, const Copies& copies,
                                             const Beside& beside, const float* scales, int source,
                                             int i) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane < p.shape.top_k && !p.places_known)
    places_of(p.routing, p.shape.top_k, source, i)[lane] = copies.place;
  if (copies.place >= 0) {
    p.out_tokens[copies.place] = beside.token;
    p.out_experts[copies.place] = beside.expert;
    p.out_weights[copies.place] = beside.weight;
  }
  if (p.format.scales == 0) return;
#pragma unroll 1
  for (unsigned rest = copies.lanes(); rest != 0; rest &= rest - 1) {
    const int place = __shfl_sync(kAllLanes, copies.place, __ffs(static_cast<int>(rest)) - 1);
    beside.write_scales(p, p.out_scales + static_cast<std::int64_t>(place) * p.format.scales,
                        scales);
  }
}
__device__ __forceinline__ std::byte* copy_at(const Params& p, std::int32_t place) {
  return p.out_x + static_cast<std::uint64_t>(place) * p.format.data_bytes;
}

/// A sender's own copies: where its token has destinations on the lanes before, this lane's copy.
struct OwnCopies {
  Copies all;              // on the lanes of their selections
  std::int32_t mine = -1;  // the copy that this lane stores

  __device__ __forceinline__ void find(const Params& p, const Outgoing& token) {
    const int lane = static_cast<int>(threadIdx.x) % 32, self = p.context.rank;
    const Placement& placement = p.shape.placement;
    const std::int32_t expert = token.beside.expert;
    const bool here = p.out_x != nullptr && expert >= 0 && placement.rank_of(expert) == self;
    all.place = here ? place_in_group(p.routing, placement, p.out_rows, self,
                                      placement.local_index(expert), token.beside.position)
                     : -1;
    const unsigned copies = all.lanes();
    // Copies take the lane of this rank's row and those without a destination: there are enough,
    // for each of the other destinations has a selection elsewhere.
    const unsigned taken = __ballot_sync(kAllLanes, token.to.rank >= 0 && token.to.rank != self);
    const int before = __popc(~taken & ((1U << lane) - 1));
    const bool stores = (taken >> lane & 1U) == 0 && before < __popc(copies);
    mine = __shfl_sync(kAllLanes, all.place, stores ? lane_of(copies, before) : 0);
    if (!stores) mine = -1;
  }
  /// The token is the `i`-th of this rank's here.
  __device__ __forceinline__ void write(const Params& p, const Outgoing& token, int i) const {
    Beside beside = token.beside;
    if (all.place >= 0) beside.expert = p.shape.placement.local_index(beside.expert);
    write_copies(p, all, beside, token.scales(p), p.context.rank, i);
  }
};

/// Whether there are so few tokens that their warps announce their rows.
__device__ __forceinline__ bool is_direct(const Params& p) {
  return p.tokens <= p.senders * writing_blocks(p.context);
}

template <class Layout>
__device__ bool send_to_rings(const Params& p, BlockShared& s, int warp) {
  const Context& c = p.context;
  const RingSlots& ring = p.shape.slots.ring;
  const int blocks = writing_blocks(c);
  SharedRows tokens({p.tickets, p.tokens, p.senders * blocks, true,
                     warp * blocks + static_cast<int>(blockIdx.x)});
  Outgoing token;
  OwnCopies own;
  bool good = true;
  Written written(p.queue, p.queue_places, is_direct(p));
  auto ready = [&](int row, bool) { return good && tokens.take(row) ? Answer::row : Answer::end; };
  auto piece = [&](const Cursor& at) { return piece_of_token(p, tokens.at(at.row), at); };
  // Whether this lane has a destination that has room for the row, in a ring or, own rows, in the
  // output.
  auto sends = [&] {
    const Destination to = token.to;
    return to.rank >= 0 && (to.rank != c.rank || p.out_x != nullptr) &&
           s.run_at(to.rank).has_room(static_cast<std::uint32_t>(to.row));
  };
  auto frame_of = [&](int rank, std::uint32_t row) { return s.frames_to[rank] + row; };
  bool found = true;  // this lane's frame is free
  auto room = [&] {
    return has_room(c, ring, token.to.rank,
                    frame_of(token.to.rank, static_cast<std::uint32_t>(token.to.row)));
  };
  bool asked = false;  // some lane's frame had to be asked for
  auto look = [&](int row) {
    token.load(p, tokens.at(row));
    const bool known = !sends() || token.to.rank == c.rank ||
                       is_free(s, ring, token.to.rank, static_cast<std::uint32_t>(token.to.row));
    found = known || room();
    asked = __any_sync(kAllLanes, !known);
    if constexpr (Layout::kGrouped) own.find(p, token);
  };
  auto open = [&](int, bool wait) {
    if (!good || !asked) return true;
    if (wait) written.post(c, ring, s.frames_to);
    if (!found && wait)
      found = wait_until(c, token.to.rank, Phase::credit, static_cast<std::uint64_t>(token.to.row),
                         room);
    else if (!found)
      found = room();
    const bool all = __all_sync(kAllLanes, found);
    __syncwarp();  // what one lane acquired, all may use
    if (wait) good = all;
    if (all) let_bulk_copies_see();
    return all;
  };
  auto place_of = [&](int rank, std::uint32_t row) {
    return rank == c.rank ? output_place(p, s.run_at(rank).place(row))
                          : place_in<Layout>(p, frame_to(c, ring, rank, frame_of(rank, row)));
  };
  auto land = [&](const Cursor& at) -> Landing {
    bool mine = good && sends();
    const auto row = static_cast<std::uint32_t>(token.to.row);
    if constexpr (Layout::kGrouped) {
      const unsigned home = __ballot_sync(kAllLanes, mine && token.to.rank == c.rank);
      mine = mine && token.to.rank != c.rank;
      if (at.piece == 0 && home != 0)
        own.write(p, token,
                  __shfl_sync(kAllLanes, token.to.row, __ffs(static_cast<int>(home)) - 1));
    }
    if (at.piece == 0) token.write_all(p, __ballot_sync(kAllLanes, mine), row, place_of);
    if (Layout::kGrouped && good && own.mine >= 0)
      return {copy_at(p, own.mine) + offset_of(p.moving, at), c.rank, 0};
    if (!mine) return {};
    return {place_of(token.to.rank, row).x + offset_of(p.moving, at), token.to.rank, token.to.row};
  };
  auto done = [&](const Cursor& at, const Landing& landing) {
    if (at.piece == p.moving.pieces - 1 &&
        written.add(landing.rank == c.rank ? -1 : landing.rank, landing.row))
      written.post(c, ring, s.frames_to);
  };
  move_rows(stages_of(s, p.moving, warp, 1), p.moving, Moves{ready, piece, look, open, land, done});
  written.post(c, ring, s.frames_to);
  return good;
}

/// Announces what all senders of the grid write, unless they do; one warp of it.
__device__ void announce_rows(const Params& p, const BlockShared& s) {
  const Context& c = p.context;
  if (is_direct(p)) return;
  int rows = 0;
  for (int i = 1; i < c.size; ++i) rows += s.rows_to(p.routing, (c.rank + i) % c.size);
  announce_frames(c, p.shape.slots.ring, {p.queue, p.queue_places}, rows, s.frames_to);
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
  const int thread =
      (warp * workers(c) + static_cast<int>(blockIdx.x)) * 32 + static_cast<int>(threadIdx.x) % 32;
  const int threads = receivers_of(p) * workers(c) * 32;
  bool good = true;
  for (int i = 1; i < c.size && good; ++i) {
    const int source = (c.rank + i) % c.size, rows = p.routing.rows_from[source];
    for (int chunk = thread; chunk * kChunk < rows && good; chunk += threads)
      good = await_chunk(p, source, chunk, n);
  }
  return __all_sync(kAllLanes, good);
}

/// Copies rows of other ranks out of the rings as they come, or, without outputs, lets them
/// through; one warp.
template <class Layout>
__device__ bool take_rows(const Params& p, BlockShared& s, int warp) {
  const Context& c = p.context;
  const RingSlots& ring = p.shape.slots.ring;
  const int lane = static_cast<int>(threadIdx.x) % 32, blocks = workers(c);
  const Servers servers{warp * blocks + static_cast<int>(blockIdx.x),
                        receivers_of(p) * blocks - 1,  // the last one announces
                        p.tickets + kRingTickets};
  auto rows_of = [&](int source) { return s.rows_from(c, p.routing, source); };
  Served served(c, servers, rows_of);
  Served::Row held{};  // lane i % 32: the i-th row
  Owed owed;           // lane 0
  bool good = true;
  auto frame_of = [&](const Served::Row& at) {
    return s.frames_from[at.peer] + static_cast<Epoch>(at.row);
  };
  auto ready = [&](int i, bool wait) {
    if (wait) owed.give_back(c, ring);
    Served::Row found{};
    const Answer answer = served.next(
        c, Phase::dispatch_rows, wait, rows_of,
        [&](const Served::Row& at) { return has_come(c, ring, at.peer, frame_of(at)); }, &found,
        &good);
    if (answer != Answer::row) return answer;
    let_bulk_copies_see();
    owed.give_back(c, ring);
    if (lane == i % 32) held = found;
    return answer;
  };
  auto row_at = [&](int i) -> Served::Row {
    return {__shfl_sync(kAllLanes, held.peer, i % 32), __shfl_sync(kAllLanes, held.row, i % 32)};
  };
  auto place_of = [&](const Served::Row& at) {
    return place_in<Layout>(p, const_cast<std::byte*>(frame_from(c, ring, at.peer, frame_of(at))));
  };
  auto piece = [&](const Cursor& at) {
    return piece_of(p.moving, place_of(row_at(at.row)).x, p.format.data_bytes, at);
  };
  Beside beside;
  Copies copies;
  auto look = [&](int i) {
    const RowPlace from = place_of(row_at(i));
    beside.token = *from.token;
    if (lane < p.shape.top_k) {
      beside.expert = from.experts[lane];
      beside.weight = from.weights[lane];
      if constexpr (Layout::kGrouped) beside.position = from.positions[lane];
    }
    beside.load_scales(p, from.scales);
  };
  auto open = [](int, bool) { return true; };
  auto land = [&](const Cursor& at) -> Landing {
    const Served::Row from = row_at(at.row);
    if (p.out_x == nullptr) return {nullptr, from.peer, from.row};
    if constexpr (Layout::kGrouped) {
      if (at.piece == 0) {
        const bool selected = lane < p.shape.top_k && beside.expert >= 0;
        copies.place = selected ? place_in_group(p.routing, p.shape.placement, p.out_rows,
                                                 from.peer, beside.expert, beside.position)
                                : -1;
        write_copies(p, copies, beside, place_of(from).scales, from.peer, from.row);
      }
      return {copies.place >= 0 ? copy_at(p, copies.place) + offset_of(p.moving, at) : nullptr,
              from.peer, from.row};
    }
    const Run run = s.run_from(c, p.routing, from.peer);
    const RowPlace to = output_place(p, run.place(static_cast<std::uint32_t>(from.row)));
    if (at.piece == 0) beside.write(p, to, place_of(from).scales);
    return {lane == 0 ? to.x + offset_of(p.moving, at) : nullptr, from.peer, from.row};
  };
  auto done = [&](const Cursor& at, const Landing& landing) {
    if (at.piece != p.moving.pieces - 1) return;
    owed.give_back(c, ring);
    if (lane == 0) owed.set(landing.rank, frame_of({landing.rank, landing.row}));
  };
  move_rows(stages_of(s, p.moving, p.senders + warp, 1), p.moving,
            Moves{ready, piece, look, open, land, done});
  owed.give_back(c, ring);
  return good;
}

/// How many frames have passed; the last block.
__device__ void advance_rings(const Params& p, const BlockShared& s) {
  const Context& c = p.context;
  for (int peer = threadIdx.x; peer < c.size; peer += blockDim.x)
    if (peer != c.rank)
      advance(c, p.shape.slots.ring, s, peer, s.rows_to(p.routing, peer),
              s.rows_from(c, p.routing, peer));
}

}  // namespace

// Kernel -----------------------------------------------------------------------------------------

namespace high_throughput {

template <class Layout>
__global__ void __launch_bounds__(kHighThroughputWarps * 32, 1)
    dispatch(const __grid_constant__ HighThroughputDispatchParams p) {
  extern __shared__ __align__(128) std::byte memory[];
  BlockShared& s = *reinterpret_cast<BlockShared*>(memory);
  const Context& c = p.context;
  const auto lane = direction(c, p.shape.slots.dispatch);
  start(p);
  const Peeked peeked = peek(c, lane);
  take_routing(c, p.routing, p.shape.slots.ring, peeked, direction(c, p.shape.slots.combine), s);
  const bool carries = is_courier(c);
  const Entry entry = carries ? carry_along(c, lane, p.shape.slots.dispatch, /*of_receive=*/true)
                              : admit(c, lane, peeked);
  if (!entry.usable || stops(c, Phase::dispatch_rows)) return;
  const Epoch n = entry.send;
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.epoch = n;
  mark(c, kAdmitted);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  bool good = true;
  if (blockIdx.x == 0 && warp == p.senders) good = exchange_calls(p, n);
  if (carries || s.overflow) {
    // With an overflow nothing is sent, on any rank; the epoch ends all the same.
  } else if (warp < p.senders) {
    let_bulk_copies_see();  // credit, behind which they write
    if (p.pool)
      send_to_pools(p, s, warp, n);
    else if (static_cast<int>(blockIdx.x) < writing_blocks(c))
      good = send_to_rings<Layout>(p, s, warp);
    mark(c, kSent);
  } else if (!p.pool && warp == kHighThroughputWarps - 1 && is_last_block(c)) {
    announce_rows(p, s);
  } else if (good) {
    good = p.pool ? await_rows(p, warp - p.senders, n) : take_rows<Layout>(p, s, warp - p.senders);
  }
  if (good && !carries && p.out_x != nullptr) pad_output<Layout>(p, s);
  if (!__syncthreads_and(good) || stops(c, Phase::release)) return;
  mark(c, kReceived);
  if (leave_receive(c, lane, p.shape.slots.dispatch, n, p.keep, true)) {
    return_tickets(p.tickets);
    if (!p.pool && !s.overflow) advance_rings(p, s);
  }
  mark(c, kEnded);
}

}  // namespace high_throughput

// Launch -----------------------------------------------------------------------------------------

cudaError_t launch(const HighThroughputDispatchParams& params, const HighThroughputLaunch& launch) {
  return with_layout(params.grouped, [&](auto layout) {
    high_throughput::dispatch<decltype(layout)>
        <<<launch.blocks + params.context.couriers, kHighThroughputWarps * 32,
           shared_bytes(params.moving.bulk), launch.stream>>>(params);
    return cudaGetLastError();
  });
}

cudaError_t prepare_high_throughput_dispatch(bool bulk) {
  return for_each_layout([&](auto layout) {
    return cudaFuncSetAttribute(high_throughput::dispatch<decltype(layout)>,
                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(shared_bytes(bulk)));
  });
}

}  // namespace expertwire::ep::cuda
