// High-throughput notify: before rows move, every rank learns how many go where, so that each row
// can be written once, into its final place.
//
// Roles. The first block counts all tokens, sends the counts to every rank, waits for theirs, and
// sums them up. The others own contiguous tokens: each counts those before its own, so that it can
// give its tokens their rows without asking anybody. With one block alone it does both.
//
// Who writes what. counts [slot][source] of a rank are written by that source; the routing by this
// rank.
//
// Memory order. Credit of every peer is acquired before the first store. Counts carry their epoch.
// The host's copy is released by its ticket.
//
// Cost. A block reads topk_idx up to the end of its tokens, the first all of it.

#include <algorithm>

#include "ep/cuda/counting.cuh"
#include "ep/cuda/high_throughput_kernels.hpp"
#include "ep/cuda/kernel.cuh"

namespace expertwire::ep::cuda {

// Config -----------------------------------------------------------------------------------------

namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kTokensOfBlock = 256;  // that a block places, where there are SMs enough
constexpr unsigned kAll = 0xFFFFFFFFU;

// Params -----------------------------------------------------------------------------------------

using Params = NotifyParams;

/// Behind it: selections of each expert [E], and rows of each (warp, rank) [kWarps, R].
struct Shared {
  std::int32_t total_to_rank[kMostRanks];  // tokens of all, or those before this block's
  std::int32_t needed;
};

__device__ std::int32_t* expert_rows(Shared* shared) {
  return reinterpret_cast<std::int32_t*>(shared + 1);
}
__device__ std::int32_t* warp_rows(const Params& p, Shared* shared) {
  return expert_rows(shared) + p.shape.placement.experts;
}

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

/// Takes the experts of a token into the handle and returns the ranks that hold them.
__device__ RankSet take_experts(const Params& p, int token) {
  constexpr int kAtOnce = 8;  // loads that a lane has in flight
  const std::int64_t first = static_cast<std::int64_t>(token) * p.shape.top_k;
  RankSet ranks;
  for (int base = 0; base < p.shape.top_k; base += kAtOnce) {
    std::int32_t experts[kAtOnce];
    bool valid = true;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      experts[k] = base + k < p.shape.top_k
                       ? p.ids.at(first + base + k, p.shape.placement.experts, &valid)
                       : -1;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (base + k < p.shape.top_k) p.routing.experts[first + base + k] = experts[k];
      if (experts[k] >= 0) ranks.add(p.shape.placement.rank_of(experts[k]));
    }
  }
  return ranks;
}

/// Gives up to kThreads tokens their rows, a thread a token, and adds them to `so_far`. All
/// threads.
__device__ void place_tokens(const Params& p, Shared& s, const Part& tokens, std::int32_t* so_far) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int size = p.context.size, width = p.shape.width;
  const int token = tokens.begin + static_cast<int>(threadIdx.x);
  RankSet ranks;
  if (token < tokens.end) ranks = take_experts(p, token);
  std::int32_t* mine = warp_rows(p, &s) + warp * size;
  for (int rank = 0; rank < size; ++rank) {
    const unsigned going = __ballot_sync(kAll, ranks.has(rank));
    if (lane == 0) mine[rank] = __popc(going);
  }
  __syncthreads();
  for (int rank = threadIdx.x; rank < size; rank += kThreads) {
    std::int32_t sum = so_far[rank];
    for (int w = 0; w < kWarps; ++w) {
      std::int32_t& rows = warp_rows(p, &s)[w * size + rank];
      const std::int32_t count = rows;
      rows = sum;
      sum += count;
    }
    so_far[rank] = sum;
  }
  __syncthreads();
  Destination* list = p.routing.destinations + static_cast<std::int64_t>(token) * width;
  int found = 0;
  for (int rank = 0; rank < size; ++rank) {
    const unsigned going = __ballot_sync(kAll, ranks.has(rank));
    if (ranks.has(rank)) list[found++] = {rank, mine[rank] + __popc(going & ((1U << lane) - 1))};
  }
  if (token < tokens.end)
    for (; found < width; ++found) list[found] = {-1, -1};
  __syncthreads();
}

/// The tokens that a block places: none in the first, if there are others.
__device__ Part tokens_of_block(const Params& p) {
  const auto block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  if (blocks == 1) return {0, p.tokens};
  return block == 0 ? Part{0, 0} : part_of(p.tokens, block - 1, blocks - 1);
}

// Roles: counts ----------------------------------------------------------------------------------

__device__ void send_counts(const Params& p, Shared& s, Epoch n) {
  using Slots = HighThroughputSlots;
  const Context& c = p.context;
  const int size = c.size, local = p.shape.placement.local_experts();
  const int entries = Slots::kHeader + size + local;
  for (int i = threadIdx.x; i < size * entries; i += kThreads) {
    const int peer = i / entries, entry = i % entries;
    std::int32_t value = p.strict ? -1 - p.capacity : p.capacity;
    if (entry == Slots::kFormat) value = static_cast<std::int32_t>(p.format.dtype);
    if (entry >= Slots::kHeader + size)
      value = expert_rows(&s)[peer * local + entry - Slots::kHeader - size];
    else if (entry >= Slots::kHeader)
      value = s.total_to_rank[entry - Slots::kHeader];
    tell<KernelAccess>(at<Tagged>(c, peer, p.shape.slots.counts_of(n, c.rank)) + entry, value, n);
  }
  for (int rank = threadIdx.x; rank < size; rank += kThreads)
    p.routing.rows_to[rank] = s.total_to_rank[rank];
}

/// Waits for everything that all ranks tell. All threads; afterwards it may be read by any.
__device__ bool await_counts(const Params& p, Epoch n) {
  const Context& c = p.context;
  const int entries = HighThroughputSlots::kHeader + c.size + p.shape.placement.local_experts();
  bool good = true;
  for (int i = threadIdx.x; i < c.size * entries && good; i += kThreads) {
    const int source = i / entries;
    std::int32_t value = 0;
    good = await_told(c, source,
                      at<const Tagged>(c, c.rank, p.shape.slots.counts_of(n, source)) + i % entries,
                      n, &value);
  }
  return __syncthreads_and(good);
}

/// What `source` told, once await_counts() has seen it.
__device__ __forceinline__ std::int32_t count_from(const Params& p, int source, int entry,
                                                   Epoch n) {
  const auto* counts =
      at<const Tagged>(p.context, p.context.rank, p.shape.slots.counts_of(n, source));
  return KernelAccess::load(counts + entry).value;
}

/// Sums up what all ranks told. False if they disagree about capacities or rows.
__device__ bool sum_up(const Params& p, Shared& s, Epoch n) {
  using Slots = HighThroughputSlots;
  const Context& c = p.context;
  const HighThroughputRouting& r = p.routing;
  bool agree = true, overflow = false;
  for (int to = threadIdx.x; to < c.size; to += kThreads) {
    const std::int32_t told = count_from(p, to, Slots::kCapacity, n);
    const std::int32_t format = count_from(p, to, Slots::kFormat, n);
    if ((told < 0) != p.strict || format != static_cast<std::int32_t>(p.format.dtype)) {
      const bool rows = (told < 0) == p.strict;
      report_failure(c, ErrorCode::mismatch, to, Phase::counts,
                     rows ? static_cast<std::uint64_t>(format) + 1 : 0, 0);
      agree = false;
    }
    const std::int32_t capacity = told < 0 ? -1 - told : told;
    std::int64_t sum = 0;
    for (int source = 0; source < c.size; ++source) {
      if (source == c.rank) r.first_at[to] = static_cast<std::int32_t>(sum);
      sum += count_from(p, source, Slots::kHeader + to, n);
    }
    overflow = overflow || (p.strict && sum > capacity);
    r.capacity[to] = capacity;
    r.rows_from[to] = count_from(p, to, Slots::kHeader + c.rank, n);
  }
  if (threadIdx.x == 0) {
    std::int32_t sum = 0;
    for (int source = 0; source < c.size; ++source) {
      r.first_from[source] = sum;
      sum += count_from(p, source, Slots::kHeader + c.rank, n);
    }
    r.first_from[c.size] = sum;
    *r.needed = s.needed = sum;
  }
  const bool any_overflow = __syncthreads_or(overflow);
  if (threadIdx.x == 0) *r.overflow = any_overflow ? 1 : 0;
  return __syncthreads_and(agree);
}

/// Tells the waiting host.
__device__ void mirror(const Params& p, const Shared& s, Epoch n) {
  const Context& c = p.context;
  const int local = p.shape.placement.local_experts();
  std::int32_t* values = p.mirror.values;
  for (int i = threadIdx.x; i < c.size + local; i += kThreads) {
    std::int32_t value = 0;
    if (i < c.size) {
      value = p.routing.rows_from[i];
    } else {
      for (int source = 0; source < c.size; ++source)
        value += count_from(p, source, HighThroughputSlots::kHeader + i, n);
    }
    values[CountsMirror::kHeader + i] = value;
  }
  if (threadIdx.x == 0) {
    values[CountsMirror::kNeeded] = s.needed;
    values[CountsMirror::kOverflow] = *p.routing.overflow;
    values[CountsMirror::kEpoch] = static_cast<std::int32_t>(n);
  }
  __syncthreads();
  if (threadIdx.x == 0) device::store_release_system(p.mirror.ticket, p.ticket);
}

/// Tells all ranks what this one sends, and learns what comes; the first block.
__device__ void exchange_counts(const Params& p, Shared& s, const Direction<KernelAccess>& lane,
                                Epoch n, Epoch credit) {
  const Context& c = p.context;
  if (stops(c, Phase::credit) || !await_credits(c, lane, n, credit)) return;
  if (stops(c, Phase::counts)) return;
  mark(c, kAdmitted);
  send_counts(p, s, n);
  mark(c, kSent);
  if (!await_counts(p, n) || !sum_up(p, s, n)) return;
  mark(c, kCounted);
  if (p.mirror.values != nullptr) mirror(p, s, n);
}

}  // namespace

// Kernel -----------------------------------------------------------------------------------------

namespace high_throughput {

__global__ void __launch_bounds__(kThreads, 1) notify(const __grid_constant__ NotifyParams p) {
  extern __shared__ __align__(16) std::byte memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const Context& c = p.context;
  start(c);
  const auto lane = direction(c, p.shape.slots.dispatch);
  if (p.release != nullptr) {
    if (!enter(c, lane).usable) return;
    for (int peer = threadIdx.x; peer < c.size; peer += kThreads)
      grant<KernelAccess>(at<Epoch>(c, peer, p.shape.slots.dispatch.consumed) + c.rank, *p.release);
    return;
  }
  const bool first = blockIdx.x == 0;
  const Part own = tokens_of_block(p);
  const CountRequest request{p.ids, p.shape.placement, p.shape.top_k, first ? p.tokens : own.begin,
                             first};
  const Selections mine(p.shape.top_k);
  const std::int32_t peeked = peek_selection(request, mine);
  const Epoch credit = peek_credit(c, lane);
  for (int i = threadIdx.x; i < p.shape.placement.experts; i += kThreads) expert_rows(&s)[i] = 0;
  for (int i = threadIdx.x; i < c.size; i += kThreads) s.total_to_rank[i] = 0;
  const Entry entry = enter(c, lane);
  if (!entry.usable) return;
  count_tokens(c, request, mine, peeked, {first ? expert_rows(&s) : nullptr, s.total_to_rank});
  __syncthreads();
  if (first) exchange_counts(p, s, lane, entry.send, credit);
  if (own.begin == own.end) return;
  __syncthreads();
  if (first)  // alone: its tokens begin with the first one
    for (int i = threadIdx.x; i < c.size; i += kThreads) s.total_to_rank[i] = 0;
  __syncthreads();
  for (int begin = own.begin; begin < own.end; begin += kThreads)
    place_tokens(p, s, {begin, min(begin + kThreads, own.end)}, s.total_to_rank);
  mark(c, kEnded);
}

}  // namespace high_throughput

// Launch -----------------------------------------------------------------------------------------

namespace {

std::size_t shared_bytes(int experts, int ranks) {
  return sizeof(Shared) + static_cast<std::size_t>(experts + kWarps * ranks) * sizeof(std::int32_t);
}

}  // namespace

cudaError_t launch(const NotifyParams& params, const HighThroughputLaunch& launch) {
  const int wanted = params.release != nullptr || params.tokens == 0
                         ? 1
                         : 1 + (params.tokens + kTokensOfBlock - 1) / kTokensOfBlock;
  const int blocks = std::min(wanted, launch.blocks);
  high_throughput::
      notify<<<blocks, kThreads, shared_bytes(params.shape.placement.experts, params.context.size),
               launch.stream>>>(params);
  return cudaGetLastError();
}

cudaError_t prepare_high_throughput_notify() {
  return cudaFuncSetAttribute(high_throughput::notify, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(shared_bytes(kMostExperts, kMostRanks)));
}

}  // namespace expertwire::ep::cuda
