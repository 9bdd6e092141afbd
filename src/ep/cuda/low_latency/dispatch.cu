// Low-latency dispatch: one row per (token, rank) over the wire, expanded to experts on arrival.
//
// Roles. A block owns contiguous tokens and plans them: it counts the selections of all tokens
// before its own, so that the row and position of each of its tokens follow without asking anybody.
// The first block has none before its own; it counts all tokens and sends the counts. Rows are made
// in shared memory (images) and sent by a few warps, the senders, with the copy engine, while the
// workers receive: an SM whose threads store to a busy wire does not see what arrives. Without a
// copy engine, or for rows that do not fit, workers write the rows and then receive. Workers form
// teams; a team makes a row, and later expands row after row as they arrive. The own rank's rows
// are expanded first: in a launch with both halves from their images, if each token of a block has
// one, else from their slots as others are.
//
// Who writes what. A pair is written by its source alone, a row by
// one block; outputs and the handle's entries of a row by the team that expands it; those of a
// token by the block that plans it; ranges, tokens_per_expert and rows_from by the first block.
//
// Memory order. Counts carry their epoch. Images: written by threads, proxy fence, barrier; then a
// lane of a sender stores the row, waits until the copy is complete, and releases the row's flag at
// system scope. Without images: stores of the workers, barrier, release. The receiver's thread 0
// acquires the flag, barrier, loads. Slots are written after a credit was acquired (and a proxy
// fence). Workers meet a sender at a barrier when what they have loaded has come; it counts at
// acq_rel, and in the last block releases the credit, while the workers write the output.
//
// Cost. T * (distinct other ranks) rows over the wire and T * K rows written by receivers; a block
// reads topk_idx up to the end of its tokens, the first all of it. What a block must know from
// memory is asked for at once, before the first barrier: entry words, credit, its selections, and
// x, which comes to its image, or to L2 if it is cast (without images it is loaded when it is
// sent). A row waits for one flag; its header and payload are loaded together.

#include "ep/cuda/low_latency/rows.cuh"

namespace expertwire::inline v0::ep::cuda {

namespace {

// Params -----------------------------------------------------------------------------------------

using Params = LowLatencyDispatchParams;
using Shared = DispatchShared;

// Roles: counts ----------------------------------------------------------------------------------

__device__ __forceinline__ Saying saying(const Params& p, Epoch n) {
  return {p.context, p.shape.slots.dispatch, n, p.call, n};
}

/// Counts go to every rank, zeros too; the first block, a thread a word. They need no release: each
/// carries its epoch.
__device__ void send_counts(const Params& p, Shared& s, Epoch n) {
  static_assert(LowLatencySlots::kRows == 0 && LowLatencySlots::kHeader == 1);
  const Context& c = p.context;
  const Placement& placement = p.shape.placement;
  const std::int32_t* total = expert_counters(s) + placement.experts;
  const int words = placement.experts + c.size;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < words; i += static_cast<int>(blockDim.x)) {
    const bool count = i < placement.experts;
    const int peer = count ? placement.rank_of(i) : i - placement.experts;
    const int word = count ? LowLatencySlots::kHeader + placement.local_index(i) : 0;
    tell(c, peer, p.shape.slots.counts_of(n), word, {count ? total[i] : s.total_to_rank[peer], n});
  }
  // From the last thread on: the first have counts to tell.
  tell_call(saying(p, n), static_cast<int>(blockDim.x - 1 - threadIdx.x),
            static_cast<int>(blockDim.x));
  if (threadIdx.x == 0) *p.routing.epoch = n;
}

// Roles: sender ----------------------------------------------------------------------------------

/// The tokens of one block, batch by batch.
__device__ void send_tokens(const Params& p, Shared& s, const Part& own, Epoch n) {
  const Team team = Team::for_items(min(own.end - own.begin, p.images.count), 1);
  const Counters so_far{expert_counters(s), s.rows_to_rank};
  Batch batch{{own.begin, min(own.begin + p.images.count, own.end)}, n, 0};
#pragma unroll 1
  while (batch.count() > 0) {
    if (threadIdx.x < 32) {
#pragma unroll 1
      for (int b = 0; b < batch.count(); ++b)
        plan_token(p, s.plan, so_far, b, batch.tokens.begin + b, n, keeps_own(p),
                   reinterpret_cast<RowHeader*>(image_of(p, s, b)));
      if (has_images(p)) device::fence_proxy_async_shared();
    }
    __syncthreads();
    if (Block::sends()) {
      send_batch(p, s, batch);
    } else {
      make_rows(p, s, batch, team);
      Block::hand_over();
    }
    batch = {
        {batch.tokens.end, min(batch.tokens.end + p.images.count, own.end)}, n, batch.parity ^ 1U};
    if (batch.count() <= 0) break;
    __syncthreads();  // plan and images have been used
    if (Block::sends() && Block::sender() == 0) load_images(p, s, batch.tokens, false);
    take_selection(p, s.plan, batch.tokens, load_selection(p, batch.tokens));
    __syncthreads();
  }
}

/// The send half of one block. What is loaded before the first barrier is in flight together.
__device__ Entry send(const Params& p, Shared& s, const Direction<KernelAccess>& lane, bool* good) {
  const Context& c = p.context;
  const int experts = p.shape.placement.experts;
  const bool first = blockIdx.x == 0;
  const Part own = p.cut.of(static_cast<int>(blockIdx.x));
  const Part batch{own.begin, min(own.begin + p.images.count, own.end)};
  if (Block::sends() && Block::sender() == 0) load_images(p, s, batch, true);
  if (p.cast) prefetch_rows(p, batch);
  const int before = own.begin < own.end ? own.begin : 0;
  const CountRequest request{
      p.ids, p.shape.placement, p.shape.top_k, p.shape.by_top_k, first ? p.tokens : before, first};
  const Selections mine(p.shape.top_k, p.shape.by_top_k);
  const std::int32_t peeked = peek_selection(request, mine);
  const PlannedSelection planned = load_selection(p, batch);
  const Peeked words = peek(c, lane);
  std::int32_t* so_far = expert_counters(s);
#pragma unroll 1
  for (int i = threadIdx.x; i < 2 * experts; i += blockDim.x) so_far[i] = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < c.size; i += blockDim.x) {
    s.rows_to_rank[i] = 0;
    s.total_to_rank[i] = 0;
  }
  if (threadIdx.x < kMostImages)
    s.image_at[threadIdx.x] =
        image_of(p, s, static_cast<int>(threadIdx.x)) + p.shape.slots.header_bytes;
  __syncthreads();  // counters are zero; the loads go on
  const Counters counters =
      first ? Counters{so_far + experts, s.total_to_rank} : Counters{so_far, s.rows_to_rank};
  count_tokens(c, request, mine, peeked, counters);
  take_selection(p, s.plan, batch, planned);
  *good = !stops(c, Phase::credit);
  const Entry entry = *good ? admit(c, lane, words) : Entry{};
  *good = entry.usable && !stops(c, Phase::counts);
  mark(c, kAdmitted);
  if (*good && first) send_counts(p, s, entry.send);
  *good = *good && !stops(c, Phase::dispatch_rows);
  if (*good) {
    if (Block::sends() && has_images(p)) device::let_bulk_copies_see();
    send_tokens(p, s, own, entry.send);
  } else if (Block::sends()) {
    const int b = static_cast<int>(threadIdx.x) % 32;
    if (b < batch.end - batch.begin) await_image(p, s, b, 0);
  }
  mark(c, kSent, Block::kWorkers);
  return entry;
}

// Roles: receiver --------------------------------------------------------------------------------

__device__ __forceinline__ ExpertMajor layout_of(const Params& p) {
  const SlotSizes& sizes = p.shape.slots.sizes;
  return {static_cast<std::int64_t>(sizes.ranks * sizes.max_tokens)};
}

__device__ __forceinline__ const Tagged* counts_from(const Params& p, int source, Epoch n) {
  return inbox<Tagged>(p.context, source, p.shape.slots.counts_of(n));
}

/// Learns how many rows come from each source, and that its call belongs to this one; one warp. Own
/// rows that are kept are no items.
__device__ bool take_rows(const Params& p, Shared& s, Epoch n) {
  const Context& c = p.context;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  bool good = true;
  std::int32_t before = 0;
#pragma unroll 1
  for (int base = 0; base < c.size; base += 32) {
    const int i = base + lane, source = source_at(c, min(i, c.size - 1));
    std::int32_t told[Call::kWords + 1] = {};  // its call, and rows
    std::int32_t& rows = told[Call::kWords];
    if (i < c.size) {
      const Saying ours = saying(p, n);
      good = good &&
             await_told<Call::kWords + 1>(
                 c, n,
                 [&](int word) {
                   return word == Call::kWords ? counts_from(p, source, n) + LowLatencySlots::kRows
                                               : ours.heard_from(source, n) + word;
                 },
                 [&](int) { return source; }, told) &&
             belongs(ours, source, told);
      if (blockIdx.x == 0) p.routing.rows_from[source] = rows;
    }
    const std::int32_t sum = sum_up_to(i == 0 && keeps_own(p) ? 0 : rows, lane);
    if (i < c.size) s.first_item[i + 1] = before + sum;
    before += __shfl_sync(kAllLanes, sum, 31);
  }
  if (lane == 0) s.first_item[0] = 0;
  return __all_sync(kAllLanes, good);
}

/// Turns the sources' counts into the first place of each (source, local expert); the first block
/// also writes the outputs that tell it. All workers; false if counts did not come.
__device__ bool take_counts(const Params& p, Shared& s, Epoch n) {
  constexpr int kAtOnce = 4;
  const Context& c = p.context;
  const int local = p.shape.placement.local_experts();
  const ExpertMajor layout = layout_of(p);
  std::int32_t* places = first_places(p, s);
  bool good = true;
  const int thread = static_cast<int>(threadIdx.x), threads = Block::kWorkers - 32;
  if (thread >= threads) good = take_rows(p, s, n);  // the last warp
#pragma unroll 1
  for (int e = thread; thread < threads && e < local && good; e += threads) {
    std::int32_t sum = 0;
    for (int base = 0; base < c.size && good; base += kAtOnce) {
      std::int32_t counts[kAtOnce];
      good = await_told<kAtOnce>(
          c, n,
          [&](int i) {
            return base + i < c.size ? counts_from(p, base + i, n) + LowLatencySlots::kHeader + e
                                     : nullptr;
          },
          [&](int i) { return base + i; }, counts);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int source = base + i;
        if (source >= c.size || !good) continue;
        const auto taken = static_cast<std::int32_t>(
            layout.run(e, sum).fitting(static_cast<std::uint32_t>(counts[i])));
        places[source * local + e] = sum;
        if (blockIdx.x == 0) {
          p.ranges[static_cast<std::int64_t>(e) * c.size + source] = {taken, sum};
          if (counts[i] > taken)
            atomicAdd(&c.words->notices.dropped_rows,
                      static_cast<unsigned long long>(counts[i] - taken));
        }
        sum += taken;
      }
    }
    if (blockIdx.x == 0 && good) p.tokens_per_expert[e] = sum;
  }
  __syncwarp();
  return Block::all_workers(good);
}

/// A row that has come.
struct Arrival {
  int source;
  int index;
  const RowHeader* header;
};

/// Finds the places of a row's copies and notes them in the handle; the first warp of a team.
__device__ void find_places(const Params& p, Shared& s, Expansion& row, const Arrival& arrival) {
  const LowLatencySlots& slots = p.shape.slots;
  const int lane = static_cast<int>(threadIdx.x) % 32, top_k = p.shape.top_k;
  const std::int32_t token = arrival.header->token;
  Selection selection{-1, 0, 0};
  if (lane < top_k) selection = reinterpret_cast<const Selection*>(arrival.header + 1)[lane];
  const Placement& placement = p.shape.placement;
  const bool mine = selection.expert >= 0 && placement.rank_of(selection.expert) == p.context.rank;
  std::int32_t note = LowLatencyRouting::kEnd;
  if (mine) {
    const int local = placement.local_index(selection.expert);
    const Run run = layout_of(p).run(
        local, first_places(p, s)[arrival.source * placement.local_experts() + local]);
    const auto position = static_cast<std::uint32_t>(selection.position);
    note = run.has_room(position) ? static_cast<std::int32_t>(run.place(position))
                                  : LowLatencyRouting::kDropped;
    if (note >= 0) p.source_tokens[note] = token;
  }
  // Those of this rank come first, in top-k order.
  const unsigned all = __ballot_sync(kAllLanes, mine), before = (1U << lane) - 1;
  const int copies = __popc(all);
  const int i = mine ? __popc(all & before) : copies + __popc(~all & before);
  if (lane < top_k) {
    const std::int64_t first = (static_cast<std::int64_t>(arrival.source) *
                                    static_cast<std::int64_t>(slots.sizes.max_tokens) +
                                arrival.index) *
                               top_k;
    p.routing.copies[first + i] = note;
    p.routing.weights[first + i] = mine ? selection.weight : 0.0F;
    row.places[i] = note;
  }
  if (lane == 0) row.copies = copies;
}

/// A row on its way to its places: what a thread of a team holds of it.
struct Held {
  HeldRow row;
  float scale;  // the thread's, if there are not more than threads

  __device__ __forceinline__ void load(const Params& p, const Team& team, const std::byte* data) {
    row.load(data, vectors_of(p), team.thread, team.threads);
    if (team.thread < static_cast<int>(p.format.scales)) scale = scales_of(p, data)[team.thread];
  }
  /// Whether it is all of the row.
  __device__ static bool whole(const Params& p, const Team& team) {
    return vectors_of(p) <= HeldRow::kMost * team.threads &&
           static_cast<int>(p.format.scales) <= team.threads;
  }
  /// Waits for what has been loaded, because credit is given next: its digest, which nobody reads,
  /// cannot be known before.
  __device__ __forceinline__ void settle(const Params& p, const Team& team, Shared& s) const {
    std::uint32_t digest = row.digest(vectors_of(p), team.thread, team.threads);
    if (team.thread < static_cast<int>(p.format.scales)) digest ^= __float_as_uint(scale);
    if (digest == 0x9E3779B9U) s.digest = digest;
  }
  /// Writes the row to its places; one team.
  __device__ __forceinline__ void expand(const Params& p, const Expansion& to, const Team& team,
                                         const std::byte* data) {
    copy_held_row(row, data, vectors_of(p), team.thread, team.threads, to.copies,
                  [&](int i) -> void* {
                    const std::int64_t place = to.places[i];
                    return place >= 0 ? p.out_x + place * p.format.data_bytes : nullptr;
                  });
    const auto count = static_cast<int>(p.format.scales);
#pragma unroll 1
    for (int j = team.thread; j < count; j += team.threads) {
      const float value = j == team.thread ? scale : scales_of(p, data)[j];
#pragma unroll 1
      for (int i = 0; i < to.copies; ++i)
        if (const std::int64_t place = to.places[i]; place >= 0)
          p.out_scales[place * count + j] = value;
    }
  }

 private:
  __device__ static int vectors_of(const Params& p) {
    return static_cast<int>(p.format.data_bytes / sizeof(uint4));
  }
  __device__ static const float* scales_of(const Params& p, const std::byte* data) {
    return reinterpret_cast<const float*>(data + p.format.data_bytes);
  }
};

/// Expands rows of this rank that never left their block. Workers.
__device__ void expand_own(const Params& p, Shared& s) {
  const Context& c = p.context;
  const Part own = p.cut.of(static_cast<int>(blockIdx.x));
  const int count = own.end - own.begin;
  const Team team = Team::for_items(count, 1);
#pragma unroll 1
  for (int base = 0, turn = 0; base < count; base += team.per_block, ++turn) {
    Expansion& row = s.rows[team.in_block][turn % 2];
    const int b = base + team.in_block;
    const bool mine = b < count;
    const auto* header = reinterpret_cast<const RowHeader*>(image_of(p, s, min(b, count - 1)));
    if (mine && team.first_warp()) {
      const int lane = static_cast<int>(threadIdx.x) % 32;
      Destination to{-1, -1};
      if (lane < p.shape.width) to = s.plan.destinations[b][lane];
      const unsigned here = __ballot_sync(kAllLanes, to.rank == c.rank);
      const int index = __shfl_sync(kAllLanes, to.row, max(__ffs(static_cast<int>(here)) - 1, 0));
      if (lane == 0) row.copies = 0;
      __syncwarp();
      if (here != 0) find_places(p, s, row, {c.rank, index, header});
    }
    team.sync();
    if (!mine) continue;
    await_image(p, s, b, 0);
    Held held;
    held.load(p, team, s.image_at[b]);
    held.expand(p, row, team, s.image_at[b]);
  }
}

/// Expands rows as they come, a team a row. Workers. When the last rows have been read, and before
/// they are written, workers and senders meet.
__device__ void expand_items(const Params& p, Shared& s, Epoch n) {
  const Context& c = p.context;
  const LowLatencySlots& slots = p.shape.slots;
  bool good = true, told = false;
  int i = 0;
  const int rows = s.first_item[c.size];
  const Team team = Team::for_items(rows, workers(c));
#pragma unroll 1
  for (int base = 0, turn = 0; base < rows && good; base += team.count(), ++turn) {
    Expansion& row = s.rows[team.in_block][turn % 2];  // teams meet at the same barriers
    const int item = base + team.index();
    while (item < rows && item >= s.first_item[i + 1]) ++i;
    const int source = source_at(c, i), index = item - s.first_item[i];
    if (team.thread == 0) {
      row.good = true;
      if (item < rows) {
        const auto* flag = inbox<Epoch>(c, source, slots.row_flag_of(n, index));
        row.good = wait_until(c, source, Phase::dispatch_rows, static_cast<std::uint64_t>(index),
                              [&] { return arrived<KernelAccess>(flag, n); });
      }
    }
    team.sync();
    good = row.good;
    const bool mine = item < rows && good;
    const auto* header = rows_from<RowHeader>(c, source, slots.row_of(n, index));
    const auto* data = reinterpret_cast<const std::byte*>(header) + slots.header_bytes;
    Held held;
    if (mine) {
      held.load(p, team, data);
      if (team.first_warp()) find_places(p, s, row, {source, index, header});
    }
    told = base + team.count() >= rows && Held::whole(p, team);
    if (told && mine) held.settle(p, team, s);
    if (told) Block::meet_having_read(good);
    team.sync();
    if (mine) held.expand(p, row, team, data);
  }
  if (!told) Block::meet_having_read(good);
}

/// The workers' part.
__device__ void receive(const Params& p, Shared& s, Epoch n) {
  if (!take_counts(p, s, n)) {
    Block::meet_having_read(false);
    return;
  }
  mark(p.context, kCounted);
  if (keeps_own(p)) {
    expand_own(p, s);
    Block::sync_workers();  // teams of other sizes follow
  }
  expand_items(p, s, n);
  if (p.context.trace != nullptr) {  // what has been written is to be there
    __threadfence();
    Block::sync_workers();
  }
  mark(p.context, kReceived);
}

/// The end of the receive half: when workers have read all that came, and while they write; the
/// first sender.
__device__ void leave(const Params& p, const Direction<KernelAccess>& lane, const Entry& entry,
                      bool sends) {
  const bool good = Block::meet_having_read(true);
  if (Block::sender() != 0 || !good || stops(p.context, Phase::release)) return;
  leave_receive_by_warp(p.context, lane, p.shape.slots.dispatch, entry.receive, sends);
  mark(p.context, kEnded, Block::kWorkers);
}

}  // namespace

// Kernel -----------------------------------------------------------------------------------------

namespace low_latency {

__global__ void __launch_bounds__(Block::kThreads, 1)
    dispatch(const __grid_constant__ LowLatencyDispatchParams p) {
  extern __shared__ __align__(128) std::byte memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Context& c = p.context;
  start(p);
  const auto lane = direction(c, p.shape.slots.dispatch);
  const bool sends = (p.halves & kSendHalf) != 0, receives = (p.halves & kReceiveHalf) != 0;
  if (is_courier(c)) return carry_halves(c, lane, p.shape.slots.dispatch, p.halves);
  bool good = true;
  const Entry entry = sends ? send(p, shared, lane, &good) : enter(c, lane);
  if (!good || !entry.usable) return;
  if (!receives) return leave_send(lane, entry.send);
  if (Block::sends())
    leave(p, lane, entry, sends);
  else
    receive(p, shared, entry.receive);
}

}  // namespace low_latency

// Launch -----------------------------------------------------------------------------------------

namespace {

/// The cut of tokens: none for the first block, which sends the counts, where they are few.
Cut cut_tokens(int tokens, int blocks) {
  return cut(tokens, blocks, tokens < blocks && blocks > 1 ? 1 : 0);
}

}  // namespace

cudaError_t launch(const LowLatencyDispatchParams& params, const Launch& launch) {
  LowLatencyDispatchParams p = params;
  const LowLatencyShape& shape = p.shape;
  p.cut = cut_tokens(p.tokens, launch.blocks);
  // Shared memory for the largest call, always: a launch that changes it may wait for other
  // kernels.
  const SlotSizes& sizes = shape.slots.most;
  const Cut most = cut_tokens(static_cast<int>(sizes.max_tokens), launch.blocks);
  const std::uint32_t others = images_at(static_cast<int>(sizes.ranks * sizes.local_experts));
  p.images = plan_images({static_cast<std::uint32_t>(LowLatencySlots::header_bytes_of(sizes)),
                          static_cast<std::uint32_t>(sizes.row_bytes), most.most(),
                          shape.shared_bytes - others, shape.bulk});
  p.keeps_own = p.halves == kBothHalves && p.images.whole && p.cut.most() <= p.images.count;
  const std::uint32_t bytes = others + static_cast<std::uint32_t>(p.images.count) * p.images.stride;
  low_latency::
      dispatch<<<launch.blocks + p.context.couriers, Block::kThreads, bytes, launch.stream>>>(p);
  return cudaGetLastError();
}

std::uint32_t fewest_shared_bytes(const LowLatencyShape& shape) {
  return images_at(shape.placement.experts) + static_cast<std::uint32_t>(shape.slots.header_bytes);
}

cudaError_t prepare_low_latency_dispatch(std::uint32_t shared_bytes) {
  return cudaFuncSetAttribute(low_latency::dispatch, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(shared_bytes));
}

}  // namespace expertwire::ep::cuda
