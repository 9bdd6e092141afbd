// High-throughput notify: before rows move, every rank learns how many go where, so that each row
// can be written once, into its final place.
//
// Roles. All blocks but the first own contiguous tokens, a thread a token. A block counts its own
// and tells the others of this grid; the blocks behind it learn from that where their rows begin,
// and give their tokens their rows. The first block adds everything up, sends the counts to every
// rank, waits for theirs, and sums them up. With one block alone it does all of this.
//
// Who writes what. The counts of a pair are written by its source; tallies and the
// routing by this rank, a tally by the block that it belongs to.
//
// Memory order. Credit of every peer is acquired before the first store to it. Tallies and counts
// carry their epoch. The host's copy is released by its ticket.
//
// Cost. topk_idx is read once (twice by blocks of more than 1,024 tokens). A chain of loads: ids,
// tallies, counts of the peers.

#include <algorithm>

#include "ep/cuda/high_throughput/kernels.hpp"
#include "ep/cuda/kernel/call.cuh"
#include "ep/cuda/kernel/courier.cuh"

namespace expertwire::inline v0::ep::cuda {

// Config -----------------------------------------------------------------------------------------

namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kTokensOfBlock = 256;  // where there are SMs enough

// Params -----------------------------------------------------------------------------------------

using Params = NotifyParams;

/// In shared memory: counters of this block, and what ranks told.
struct Shared {
  std::int32_t* experts;    // [E] selections: of this block, then of all
  std::int32_t* ranks;      // [R] tokens: the same
  std::int32_t* before;     // [R] tokens of the blocks before this one
  std::int32_t* warp_rows;  // [kWarps, R] rows before each warp's
  std::int32_t* told;       // [R, entries] the counts of every rank
  std::int32_t* so_far;     // [E] selections of the tokens before, where positions are asked for
  std::uint32_t* lanes;     // [E] which lanes of a warp have one; zero between warps
  std::int32_t entries;     // of one rank's counts

  __host__ __device__ static std::size_t words(int experts, int ranks) {
    const int counts = HighThroughputSlots::kHeader + ranks + experts / ranks;
    return static_cast<std::size_t>(3 * experts + 2 * ranks + kWarps * ranks + ranks * counts);
  }
  __device__ Shared(const Params& p, std::int32_t* memory) {
    const int size = p.context.size;
    experts = memory;
    so_far = experts + p.shape.placement.experts;
    lanes = reinterpret_cast<std::uint32_t*>(so_far + p.shape.placement.experts);
    ranks = so_far + 2 * p.shape.placement.experts;
    before = ranks + size;
    warp_rows = before + size;
    told = warp_rows + kWarps * size;
    entries = HighThroughputSlots::kHeader + size + p.shape.placement.local_experts();
  }
  __device__ std::int32_t count_from(int source, int entry) const {
    return told[source * entries + entry];
  }
};

/// A set of ranks.
struct RankSet {
  std::uint64_t low = 0, high = 0;
  static_assert(kMostRanks == 128);

  __device__ void add(int rank) {
    if (rank < 64)
      low |= 1ULL << rank;
    else
      high |= 1ULL << (rank - 64);
  }
  __device__ bool has(int rank) const {
    return ((rank < 64 ? low >> rank : high >> (rank - 64)) & 1ULL) != 0;
  }
};

// Roles: planner ---------------------------------------------------------------------------------

/// Takes the experts of a token into the handle and returns the ranks that hold them. Counts them,
/// too, and remembers ids that are out of range, if `count` is set.
__device__ RankSet take_experts(const Params& p, const Shared& s, int token, bool count) {
  constexpr int kAtOnce = 8;  // loads that a lane has in flight
  const std::int64_t first = static_cast<std::int64_t>(token) * p.shape.top_k;
  RankSet ranks;
  for (int base = 0; base < p.shape.top_k; base += kAtOnce) {
    std::int32_t experts[kAtOnce];
    bool valid[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      if (base + k < p.shape.top_k)
        experts[k] = p.ids.at(first + base + k, p.shape.placement.experts, &valid[k]);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (base + k >= p.shape.top_k) continue;
      if (!valid[k] && count) note_invalid_id(p.context.words->notices, p.ids, first + base + k);
      p.routing.experts[first + base + k] = experts[k];
      if (experts[k] < 0) continue;
      if (count) atomicAdd(&s.experts[experts[k]], 1);
      ranks.add(p.shape.placement.rank_of(experts[k]));
    }
  }
  return ranks;
}

/// Up to kThreads tokens, a thread a token: takes their experts, and leaves in warp_rows how many
/// of them go to each rank before each warp's. Adds them to `sums`. All threads.
__device__ RankSet take_tokens(const Params& p, const Shared& s, const Part& tokens, bool count,
                               std::int32_t* sums) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int size = p.context.size, token = tokens.begin + static_cast<int>(threadIdx.x);
  RankSet ranks;
  if (token < tokens.end) ranks = take_experts(p, s, token, count);
#pragma unroll 1
  for (int rank = 0; rank < size; ++rank) {
    const unsigned going = __ballot_sync(kAllLanes, ranks.has(rank));
    if (lane == 0) s.warp_rows[warp * size + rank] = __popc(going);
  }
  __syncthreads();
#pragma unroll 1
  for (int rank = warp; rank < size; rank += kWarps) {  // a warp a rank, a lane a warp
    static_assert(kWarps == 32);
    const std::int32_t rows = s.warp_rows[lane * size + rank];
    const std::int32_t sum = sum_up_to(rows, lane);
    s.warp_rows[lane * size + rank] = sum - rows;
    if (lane == 31) sums[rank] += sum;
  }
  __syncthreads();
  return ranks;
}

/// Gives the tokens that take_tokens() took their rows; `before` are those of earlier tokens.
__device__ void place_tokens(const Params& p, const Shared& s, const Part& tokens,
                             const RankSet& ranks, const std::int32_t* before) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int size = p.context.size, width = p.shape.width;
  const int token = tokens.begin + static_cast<int>(threadIdx.x);
  Destination* list = p.routing.destinations + static_cast<std::int64_t>(token) * width;
  int found = 0;
#pragma unroll 1
  for (int rank = 0; rank < size; ++rank) {
    const unsigned going = __ballot_sync(kAllLanes, ranks.has(rank));
    if (ranks.has(rank))
      list[found++] = {rank, before[rank] + s.warp_rows[warp * size + rank] +
                                 __popc(going & ((1U << lane) - 1))};
  }
  if (token < tokens.end)
#pragma unroll 1
    for (; found < width; ++found) list[found] = {-1, -1};
}

/// Gives the selections of a warp's tokens, a lane a token, their positions among this rank's of
/// the same expert: `so_far`, then by token, then in top-k order. One warp at a time.
__device__ void place_selections(const Params& p, const Shared& s, const Part& tokens) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int token = tokens.begin + static_cast<int>(threadIdx.x), top_k = p.shape.top_k;
  const std::int64_t first = static_cast<std::int64_t>(token) * top_k;
  const int count = token < tokens.end ? top_k : 0;
  const std::int32_t* experts = p.routing.experts + first;
  std::int32_t* positions = p.routing.positions + first;
  bool repeats = false;
#pragma unroll 1
  for (int k = 0; k < count; ++k)
    if (experts[k] >= 0)
      repeats = repeats || (atomicOr(&s.lanes[experts[k]], 1U << lane) & 1U << lane) != 0;
  const bool any_repeats = __any_sync(kAllLanes, repeats);
  __syncwarp();
  if (any_repeats) {  // a lane has an expert twice: one lane after another
#pragma unroll 1
    for (int turn = 0; turn < 32; ++turn) {
#pragma unroll 1
      for (int k = 0; turn == lane && k < count; ++k) {
        const std::int32_t expert = experts[k];
        positions[k] = expert < 0 ? -1 : s.so_far[expert]++;
        if (expert >= 0) s.lanes[expert] = 0;
      }
      __syncwarp();
    }
    return;
  }
  unsigned counts = 0;  // bit k: this lane is the last that has the expert of k
#pragma unroll 1
  for (int k = 0; k < count; ++k) {
    const std::int32_t expert = experts[k];
    const unsigned all = expert < 0 ? 0 : s.lanes[expert];
    positions[k] = expert < 0 ? -1 : s.so_far[expert] + __popc(all & ((1U << lane) - 1));
    if (all >> lane == 1) counts |= 1U << k;
  }
  __syncwarp();
#pragma unroll 1
  for (unsigned rest = counts; rest != 0; rest &= rest - 1) {
    const std::int32_t expert = experts[__ffs(static_cast<int>(rest)) - 1];
    s.so_far[expert] += __popc(s.lanes[expert]);
    s.lanes[expert] = 0;
  }
  __syncwarp();
}

/// The same of all tokens of a round; all threads.
__device__ void place_all_selections(const Params& p, const Shared& s, const Part& tokens) {
#pragma unroll 1
  for (int warp = 0; warp * 32 < tokens.end - tokens.begin; ++warp) {
    if (static_cast<int>(threadIdx.x) / 32 == warp) place_selections(p, s, tokens);
    __syncthreads();
  }
}

// Roles: tallies ---------------------------------------------------------------------------------

/// What a block tells the others of this grid: tokens of each rank, selections of each expert.
__device__ Tagged* tally_of(const Params& p, int block) {
  return p.tallies +
         static_cast<std::int64_t>(block - 1) * (p.context.size + p.shape.placement.experts);
}

__device__ void tell_tally(const Params& p, const Shared& s, Epoch n) {
  Tagged* tally = tally_of(p, static_cast<int>(blockIdx.x));
  const int size = p.context.size;
#pragma unroll 1
  for (int i = threadIdx.x; i < size + p.shape.placement.experts; i += kThreads)
    tell<KernelAccess>(tally + i, i < size ? s.ranks[i] : s.experts[i - size], n);
}

/// Adds the first `width` words of the tallies of blocks [1, end) to counters; all threads. False
/// if the wait was given up.
template <class CounterOf>
__device__ bool add_tallies(const Params& p, int end, int width, Epoch n, CounterOf counter_of) {
  constexpr int kAtOnce = 5;  // for 16 blocks and 256 experts
  const int words = (end - 1) * width;
  bool good = true;
  for (int base = static_cast<int>(threadIdx.x); base < words && good; base += kAtOnce * kThreads) {
    std::int32_t values[kAtOnce];
    good = await_told<kAtOnce>(
        p.context, n,
        [&](int i) {
          const int at = base + i * kThreads;
          return at < words ? tally_of(p, 1 + at / width) + at % width : nullptr;
        },
        [&](int) { return p.context.rank; }, values);
    for (int i = 0; i < kAtOnce && good; ++i)
      if (base + i * kThreads < words && values[i] != 0)
        atomicAdd(counter_of((base + i * kThreads) % width), values[i]);
  }
  return __syncthreads_and(good);
}

// Roles: counts ----------------------------------------------------------------------------------

__device__ __forceinline__ Saying saying(const Params& p, Epoch n) {
  return {p.context, p.shape.slots.dispatch, n, p.call, n};
}

__device__ void send_counts(const Params& p, const Shared& s, Epoch n) {
  using Slots = HighThroughputSlots;
  const Context& c = p.context;
  const int size = c.size, local = p.shape.placement.local_experts();
#pragma unroll 1
  for (int i = threadIdx.x; i < size * s.entries; i += kThreads) {
    const int peer = i / s.entries, entry = i % s.entries;
    std::int32_t value = p.capacity;
    if (entry >= Slots::kHeader + size)
      value = s.experts[peer * local + entry - Slots::kHeader - size];
    else if (entry >= Slots::kHeader)
      value = s.ranks[entry - Slots::kHeader];
    tell(c, peer, p.shape.slots.counts_of(n), entry, {value, n});
  }
#pragma unroll 1
  for (int rank = threadIdx.x; rank < size; rank += kThreads)
    p.routing.rows_to[rank] = s.ranks[rank];
  tell_call(saying(p, n), static_cast<int>(threadIdx.x), kThreads);
  if (threadIdx.x == 0) *p.routing.epoch = n;
}

/// Waits for everything that all ranks tell, and takes it. All threads.
__device__ bool take_counts(const Params& p, const Shared& s, Epoch n) {
  const Context& c = p.context;
  bool good = true;
#pragma unroll 1
  for (int i = threadIdx.x; i < c.size * s.entries && good; i += kThreads) {
    const int source = i / s.entries;
    const auto* counts = inbox<Tagged>(c, source, p.shape.slots.counts_of(n));
    std::int32_t value = 0;
    good = await_told<1>(
        c, n, [&](int) { return counts + i % s.entries; }, [&](int) { return source; }, &value);
    s.told[i] = value;
  }
  // From the last thread on: the first have counts to wait for.
  const int source = kThreads - 1 - static_cast<int>(threadIdx.x);
  if (source < c.size)
    good = good && compare_earlier_call(saying(p, n), source) && compare_call(saying(p, n), source);
  return __syncthreads_and(good);
}

/// Says where groups lie, and every source's rows in them; one warp.
__device__ void place_groups(const Params& p, const Shared& s) {
  if (threadIdx.x >= 32) return;
  const HighThroughputRouting& r = p.routing;
  const int lane = static_cast<int>(threadIdx.x), size = p.context.size;
  const int local = p.shape.placement.local_experts(), entry = HighThroughputSlots::kHeader + size;
  std::int32_t rows_before = 0, padded_before = 0;
#pragma unroll 1
  for (int base = 0; base < local; base += 32) {
    const int e = base + lane;
    std::int32_t rows = 0;
#pragma unroll 1
    for (int source = 0; e < local && source < size; ++source)
      rows += s.count_from(source, entry + e);
    const std::int32_t padded = (rows + p.alignment - 1) / p.alignment * p.alignment;
    const std::int32_t rows_sum = sum_up_to(rows, lane), padded_sum = sum_up_to(padded, lane);
    if (e < local) {
      r.expert_offsets[e] = rows_before + rows_sum - rows;
      std::int32_t next = r.group_offsets[e] = padded_before + padded_sum - padded;
#pragma unroll 1
      for (int source = 0; source < size; ++source) {
        r.first_in[source * local + e] = next;
        next += s.count_from(source, entry + e);
      }
    }
    rows_before += __shfl_sync(kAllLanes, rows_sum, 31);
    padded_before += __shfl_sync(kAllLanes, padded_sum, 31);
  }
  if (lane != 0) return;
  r.expert_offsets[local] = rows_before;
  *r.needed = r.group_offsets[local] = padded_before;
}

/// Sums up what all ranks told.
__device__ void sum_up(const Params& p, const Shared& s) {
  using Slots = HighThroughputSlots;
  const Context& c = p.context;
  const HighThroughputRouting& r = p.routing;
  bool overflow = false;
#pragma unroll 1
  for (int to = threadIdx.x; to < c.size; to += kThreads) {
    const std::int32_t capacity = s.count_from(to, Slots::kCapacity);
    std::int64_t sum = 0;
    std::int32_t first_from = 0;
#pragma unroll 1
    for (int source = 0; source < c.size; ++source) {
      if (source == c.rank) r.first_at[to] = static_cast<std::int32_t>(sum);
      sum += s.count_from(source, Slots::kHeader + to);
      if (source < to) first_from += s.count_from(source, Slots::kHeader + c.rank);
    }
    overflow = overflow || (p.strict && sum > capacity);
    r.capacity[to] = capacity;
    r.rows_from[to] = s.count_from(to, Slots::kHeader + c.rank);
    r.first_from[to] = first_from;
    if (to == c.rank) {
      r.first_from[c.size] = static_cast<std::int32_t>(sum);
      if (r.positions == nullptr) *r.needed = static_cast<std::int32_t>(sum);
    }
  }
  if (r.positions != nullptr) place_groups(p, s);
  const bool any_overflow = __syncthreads_or(overflow);
  if (threadIdx.x == 0) *r.overflow = any_overflow ? 1 : 0;
  __syncthreads();
}

/// Tells the waiting host.
__device__ void mirror(const Params& p, const Shared& s, Epoch n) {
  using Slots = HighThroughputSlots;
  const Context& c = p.context;
  const int local = p.shape.placement.local_experts();
  std::int32_t* values = p.mirror.values;
#pragma unroll 1
  for (int i = threadIdx.x; i < c.size + local; i += kThreads) {
    std::int32_t value = 0;
    if (i < c.size)
      value = s.count_from(i, Slots::kHeader + c.rank);
    else
#pragma unroll 1
      for (int source = 0; source < c.size; ++source)
        value += s.count_from(source, Slots::kHeader + i);
    values[CountsMirror::kHeader + i] = value;
  }
  if (threadIdx.x == 0) {
    values[CountsMirror::kNeeded] = *p.routing.needed;
    values[CountsMirror::kOverflow] = *p.routing.overflow;
    values[CountsMirror::kEpoch] = static_cast<std::int32_t>(n);
  }
  __syncthreads();
  if (threadIdx.x == 0) device::store_release_system(p.mirror.ticket, p.ticket);
}

/// Tells all ranks what this one sends, and learns what comes; the first block.
__device__ void exchange_counts(const Params& p, const Shared& s,
                                const Direction<KernelAccess>& lane, Epoch n, Epoch credit) {
  const Context& c = p.context;
  const int size = c.size;
  if (!add_tallies(p, workers(c), size + p.shape.placement.experts, n,
                   [&](int i) { return i < size ? &s.ranks[i] : &s.experts[i - size]; }))
    return;
  if (stops(c, Phase::credit) || !await_credits(c, lane, n, credit)) return;
  if (stops(c, Phase::counts)) return;
  mark(c, kAdmitted);
  send_counts(p, s, n);
  mark(c, kSent);
  if (!take_counts(p, s, n)) return;
  sum_up(p, s);
  mark(c, kCounted);
  if (p.mirror.values != nullptr) mirror(p, s, n);
}

/// Counts the tokens of a block, tells, and gives them their rows.
__device__ void plan_tokens(const Params& p, const Shared& s, const Part& own, Epoch n) {
  const bool alone = workers(p.context) == 1;
  const bool at_once = own.end - own.begin <= kThreads;
  const bool places = p.routing.positions != nullptr;
  RankSet ranks;
#pragma unroll 1
  for (int begin = own.begin; begin < own.end; begin += kThreads)
    ranks = take_tokens(p, s, {begin, min(begin + kThreads, own.end)}, true, s.ranks);
  if (!alone) {
    tell_tally(p, s, n);
    mark(p.context, kSent);
    const int size = p.context.size;
    const int width = size + (places ? p.shape.placement.experts : 0);
    if (!add_tallies(p, static_cast<int>(blockIdx.x), width, n,
                     [&](int i) { return i < size ? &s.before[i] : &s.so_far[i - size]; }))
      return;
    mark(p.context, kCounted);
  }
  if (at_once) {
    place_tokens(p, s, own, ranks, s.before);
    if (places) place_all_selections(p, s, own);
    return;
  }
#pragma unroll 1
  for (int begin = own.begin; begin < own.end; begin += kThreads) {
    const Part tokens{begin, min(begin + kThreads, own.end)};
    __syncthreads();
    std::int32_t* of_round = s.told;  // free here; sums of this round come to it
#pragma unroll 1
    for (int rank = threadIdx.x; rank < p.context.size; rank += kThreads) of_round[rank] = 0;
    __syncthreads();
    ranks = take_tokens(p, s, tokens, false, of_round);
    place_tokens(p, s, tokens, ranks, s.before);
    if (places) place_all_selections(p, s, tokens);
    __syncthreads();
#pragma unroll 1
    for (int rank = threadIdx.x; rank < p.context.size; rank += kThreads)
      s.before[rank] += of_round[rank];
  }
}

// Roles: courier ---------------------------------------------------------------------------------

/// The end of a block that plans. The epoch goes on; a count that nothing else uses meanwhile says
/// to a courier that the launch is over.
__device__ void leave_plan(const Context& c, const Direction<KernelAccess>& lane) {
  if (c.couriers == 0) return;
  __syncthreads();
  if (threadIdx.x == 0) KernelAccess::count_up(&lane.words->senders_done);
}

__device__ __noinline__ void carry_counts(const Context& c, Direction<KernelAccess> lane,
                                          const DirectionSlots& place) {
  if (!carry_along(c, lane, place, /*of_receive=*/false).usable) return;
  if (threadIdx.x == 0) KernelAccess::store(&lane.words->senders_done, 0);
}

}  // namespace

// Kernel -----------------------------------------------------------------------------------------

namespace high_throughput {

__global__ void __launch_bounds__(kThreads, 1) notify(const __grid_constant__ NotifyParams p) {
  extern __shared__ __align__(16) std::byte memory[];
  const Shared s(p, reinterpret_cast<std::int32_t*>(memory));
  const Context& c = p.context;
  start(p);
  const auto lane = direction(c, p.shape.slots.dispatch);
  const Epoch credit = peek_credit(c, lane);
  const int counters = 3 * p.shape.placement.experts + 2 * c.size;
#pragma unroll 1
  for (int i = threadIdx.x; i < counters; i += kThreads) s.experts[i] = 0;
  if (is_courier(c)) return carry_counts(c, lane, p.shape.slots.dispatch);
  const Entry entry = enter(c, lane);
  if (!entry.usable) return;
  if (p.release != nullptr) {
#pragma unroll 1
    for (int peer = threadIdx.x; peer < c.size; peer += kThreads)
      grant(c, peer, p.shape.slots.dispatch, *p.release);
    return;
  }
  const Part own = p.cut.of(static_cast<int>(blockIdx.x));
  if (blockIdx.x > 0 || workers(c) == 1) plan_tokens(p, s, own, entry.send);
  __syncthreads();
  if (blockIdx.x == 0) exchange_counts(p, s, lane, entry.send, credit);
  leave_plan(c, lane);
  mark(c, kEnded);
}

}  // namespace high_throughput

// Launch -----------------------------------------------------------------------------------------

namespace {

std::size_t shared_bytes(int experts, int ranks) {
  return Shared::words(experts, ranks) * sizeof(std::int32_t);
}

}  // namespace

cudaError_t launch(const NotifyParams& params, const HighThroughputLaunch& launch) {
  const int wanted = params.release != nullptr || params.tokens == 0
                         ? 1
                         : 1 + (params.tokens + kTokensOfBlock - 1) / kTokensOfBlock;
  int blocks = std::min({wanted, launch.blocks, 1 + kMostTallies});
  if (blocks == 2) blocks = 1;
  NotifyParams p = params;
  p.cut = cut(params.tokens, blocks, blocks == 1 ? 0 : 1);
  // Shared memory for the most experts, always: a launch that changes it may wait for others.
  const auto experts =
      static_cast<int>(p.shape.slots.most.ranks * p.shape.slots.most.local_experts);
  high_throughput::notify<<<blocks + p.context.couriers, kThreads,
                            shared_bytes(experts, p.context.size), launch.stream>>>(p);
  return cudaGetLastError();
}

cudaError_t prepare_high_throughput_notify() {
  return cudaFuncSetAttribute(high_throughput::notify, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(shared_bytes(kMostExperts, kMostRanks)));
}

}  // namespace expertwire::ep::cuda
