// Low-latency dispatch: one row per (token, rank) over the wire, expanded to experts on arrival.
//
// Roles. A block owns contiguous tokens and plans them: it counts the selections of all tokens
// before its own, so that the row and position of each of its tokens follow without asking anybody.
// The first block has none before its own; it counts all tokens and sends the counts. Rows are made
// in shared memory (images) and sent by a few warps, the senders, with the copy engine, while the
// workers receive: an SM whose threads store to a busy wire does not see what arrives. Without a
// copy engine, or for rows that do not fit, workers write the rows and then receive. Workers form
// teams; a team makes a row, and later expands row after row as they arrive. The own rank's rows
// are expanded first, from their images if all of a block's are still there, else as others are.
//
// Who writes what. Slot regions [slot][source] of a rank are written by that source alone, a row by
// one block; outputs and the handle's entries of a row by the team that expands it; ranges and
// tokens_per_expert by the first block.
//
// Memory order. Counts carry their epoch. Images: written by threads, proxy fence, barrier; then a
// lane of a sender stores the row, waits until the copy is complete, and releases the row's flag at
// system scope. Without images: stores of the workers, barrier, release. The receiver's thread 0
// acquires the flag, barrier, loads. Slots are written after a credit was acquired (and a proxy
// fence); the credit is released by the last block to finish, after a barrier and an acq_rel count
// of all blocks.
//
// Cost. T * (distinct ranks) rows, of which one is the own rank's, and T * K rows written by
// receivers; a block reads topk_idx up to the end of its tokens, the first all of it. What a block
// must know from memory is asked for at once, before the first barrier: entry words, credit, its
// selections, and x, which comes to its image, or to L2 if it is cast. A row waits for one flag;
// its header and payload are loaded together.

#include "ep/cuda/low_latency_rows.cuh"

namespace expertwire::ep::cuda {

namespace {

// Params -----------------------------------------------------------------------------------------

using Params = LowLatencyDispatchParams;
using Shared = DispatchShared;

// Roles: counts ----------------------------------------------------------------------------------

/// Counts go to every rank, zeros too; the first block. They need no release: each carries its
/// epoch.
__device__ void send_counts(const Params& p, Shared& s, Epoch n) {
  const Context& c = p.context;
  const LowLatencySlots& slots = p.shape.slots;
  const int local = p.shape.placement.local_experts();
  const int entries = LowLatencySlots::kHeader + local;
  const std::int32_t* total = expert_counters(s) + p.shape.placement.experts;
#pragma unroll 1
  for (int peer = 0; peer < c.size; ++peer) {
    Tagged* counts = at<Tagged>(c, peer, slots.counts_of(n, c.rank));
#pragma unroll 1
    for (int entry = threadIdx.x; entry < entries; entry += blockDim.x) {
      std::int32_t value = s.total_to_rank[peer];
      if (entry == LowLatencySlots::kFormat) value = static_cast<std::int32_t>(p.format.dtype);
      if (entry >= LowLatencySlots::kHeader)
        value = total[peer * local + entry - LowLatencySlots::kHeader];
      tell<KernelAccess>(counts + entry, value, n);
    }
  }
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

/// The source whose rows are the `i`-th to be expanded.
__device__ __forceinline__ int source_at(const Context& c, int i) {
  const int source = c.rank + i;
  return source < c.size ? source : source - c.size;
}

__device__ __forceinline__ const Tagged* counts_from(const Params& p, int source, Epoch n) {
  return at<const Tagged>(p.context, p.context.rank, p.shape.slots.counts_of(n, source));
}

/// Learns how many rows come from each source, and that they are of the right format; one warp. Own
/// rows that are kept are no items.
__device__ bool take_rows(const Params& p, Shared& s, Epoch n) {
  const Context& c = p.context;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  bool good = true;
  std::int32_t before = 0;
#pragma unroll 1
  for (int base = 0; base < c.size; base += 32) {
    const int i = base + lane, source = source_at(c, min(i, c.size - 1));
    std::int32_t told[2] = {};  // rows and format
    static_assert(LowLatencySlots::kRows == 0 && LowLatencySlots::kFormat == 1);
    if (i < c.size) {
      good = good && await_told<2>(
                         c, n, [&](int word) { return counts_from(p, source, n) + word; },
                         [&](int) { return source; }, told);
      if (good && told[1] != static_cast<std::int32_t>(p.format.dtype)) {
        report_failure(c, ErrorCode::mismatch, source, Phase::counts,
                       static_cast<std::uint64_t>(told[1]) + 1, 0);
        good = false;
      }
      if (blockIdx.x == 0) p.routing.rows_from[source] = told[0];
    }
    std::int32_t sum = i == 0 && keeps_own(p) ? 0 : told[0];
    for (int step = 1; step < 32; step *= 2) {
      const std::int32_t lower = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += lower;
    }
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
  const LowLatencySlots& slots = p.shape.slots;
  const int local = p.shape.placement.local_experts();
  const auto room = static_cast<std::int32_t>(slots.sizes.ranks * slots.sizes.max_tokens);
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
        const std::int32_t taken = min(counts[i], room - sum);
        places[source * local + e] = sum;
        if (blockIdx.x == 0) {
          std::int32_t* range = p.ranges + 2 * (static_cast<std::int64_t>(e) * c.size + source);
          range[0] = sum;
          range[1] = taken;
          if (counts[i] > taken)
            atomicAdd_system(&c.host->dropped_rows,
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
  const auto room = static_cast<std::int32_t>(slots.sizes.ranks * slots.sizes.max_tokens);
  const std::int32_t token = arrival.header->token;
  Selection selection{-1, 0, 0};
  if (lane < top_k) selection = reinterpret_cast<const Selection*>(arrival.header + 1)[lane];
  const Placement& placement = p.shape.placement;
  const bool mine = selection.expert >= 0 && placement.rank_of(selection.expert) == p.context.rank;
  std::int32_t note = LowLatencyRouting::kEnd;
  if (mine) {
    const int local = placement.local_index(selection.expert);
    const std::int32_t in_expert =
        first_places(p, s)[arrival.source * placement.local_experts() + local] + selection.position;
    note = in_expert < room ? local * room + in_expert : LowLatencyRouting::kDropped;
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

/// Copies a row, whose first vectors are held, to its places; one team.
__device__ void expand_row(const Params& p, const Expansion& row, const Team& team, HeldRow& held,
                           const std::byte* data, const float* scales) {
  copy_held_row(held, data, static_cast<int>(p.format.data_bytes / sizeof(uint4)), team.thread,
                team.threads, row.copies, [&](int i) -> void* {
                  const std::int64_t place = row.places[i];
                  return place >= 0 ? p.out_x + place * p.format.data_bytes : nullptr;
                });
  const auto count = static_cast<int>(p.format.scales);
#pragma unroll 1
  for (int i = team.thread; i < count * row.copies; i += team.threads) {
    const std::int64_t place = row.places[i / count];
    if (place >= 0) p.out_scales[place * count + i % count] = scales[i % count];
  }
}

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
    const auto* data = s.image_at[b];
    HeldRow held;
    held.load(data, static_cast<int>(p.format.data_bytes / sizeof(uint4)), team.thread,
              team.threads);
    expand_row(p, row, team, held, data,
               reinterpret_cast<const float*>(data + p.format.data_bytes));
  }
}

/// Expands rows as they come, a team a row. Workers; false if the wait was given up.
__device__ bool expand_items(const Params& p, Shared& s, Epoch n) {
  const Context& c = p.context;
  const LowLatencySlots& slots = p.shape.slots;
  const auto vectors = static_cast<int>(p.format.data_bytes / sizeof(uint4));
  bool good = true;
  int i = 0;
  const int rows = s.first_item[c.size];
  const Team team = Team::for_items(rows, static_cast<int>(gridDim.x));
#pragma unroll 1
  for (int base = 0, turn = 0; base < rows && good; base += team.count(), ++turn) {
    Expansion& row = s.rows[team.in_block][turn % 2];  // teams meet at the same barriers
    const int item = base + team.index();
    while (item < rows && item >= s.first_item[i + 1]) ++i;
    const int source = source_at(c, i), index = item - s.first_item[i];
    if (team.thread == 0) {
      row.good = true;
      if (item < rows) {
        const auto* flag = at<Epoch>(c, c.rank, slots.row_flag_of(n, source, index));
        row.good = wait_until(c, source, Phase::dispatch_rows, static_cast<std::uint64_t>(index),
                              [&] { return arrived<KernelAccess>(flag, n); });
      }
    }
    team.sync();
    good = row.good;
    const bool mine = item < rows && good;
    const auto* header = at<const RowHeader>(c, c.rank, slots.row_of(n, source, index));
    const auto* data = reinterpret_cast<const std::byte*>(header) + slots.header_bytes;
    HeldRow held;
    if (mine) {
      held.load(data, vectors, team.thread, team.threads);
      if (team.first_warp()) find_places(p, s, row, {source, index, header});
    }
    team.sync();
    if (mine)
      expand_row(p, row, team, held, data,
                 reinterpret_cast<const float*>(data + p.format.data_bytes));
  }
  return good;
}

/// The workers' part. False if the wait was given up.
__device__ bool receive(const Params& p, Shared& s, Epoch n) {
  if (!take_counts(p, s, n)) return false;
  mark(p.context, kCounted);
  if (keeps_own(p)) {
    expand_own(p, s);
    Block::sync_workers();  // teams of other sizes follow
  }
  return expand_items(p, s, n);
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
  bool good = true;
  const Entry entry = sends ? send(p, shared, lane, &good) : enter(c, lane);
  if (!good || !entry.usable) return;
  if (!receives) return leave_send(lane, entry.send);
  if (!Block::sends()) good = receive(p, shared, entry.receive);
  if (!__syncthreads_and(good) || stops(c, Phase::release)) return;
  mark(c, kReceived);
  leave_receive(c, lane, p.shape.slots.dispatch, entry.receive, false, sends);
  mark(c, kEnded);
}

}  // namespace low_latency

// Launch -----------------------------------------------------------------------------------------

cudaError_t launch(const LowLatencyDispatchParams& params, const Launch& launch) {
  LowLatencyDispatchParams p = params;
  const LowLatencyShape& shape = p.shape;
  p.cut = cut(p.tokens, launch.blocks, p.tokens < launch.blocks && launch.blocks > 1 ? 1 : 0);
  const std::uint32_t others = images_at(shape.placement.experts);
  p.images =
      plan_images({static_cast<std::uint32_t>(shape.slots.header_bytes),
                   p.format.data_bytes + p.format.scale_bytes(),
                   p.cut.each + (p.cut.more > 0 ? 1 : 0), shape.shared_bytes - others, shape.bulk});
  const std::uint32_t bytes = others + static_cast<std::uint32_t>(p.images.count) * p.images.stride;
  low_latency::dispatch<<<launch.blocks, Block::kThreads, bytes, launch.stream>>>(p);
  return cudaGetLastError();
}

cudaError_t prepare_low_latency_dispatch(std::uint32_t shared_bytes) {
  return cudaFuncSetAttribute(low_latency::dispatch, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(shared_bytes));
}

}  // namespace expertwire::ep::cuda
