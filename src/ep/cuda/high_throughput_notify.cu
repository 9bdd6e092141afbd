// High-throughput notify: before rows move, every rank learns how many go where, so that each row
// can be written once, into its final place.
//
// Roles. One block. A warp owns contiguous tokens and takes 32 of them at a time, a lane each:
// first it counts them by rank, then, knowing what the warps before it counted, it gives each its
// row. The same block sends the counts to every rank, waits for theirs, and sums them up.
//
// Who writes what. counts [slot][source] of a rank are written by that source; the routing by this
// rank.
//
// Memory order. Credit of every peer is acquired before the first store. Counts, barrier, release
// of one flag a peer; acquire of all peers' flags, barrier, loads. The host's copy is released by
// its ticket.
//
// Cost. topk_idx is read once and the experts once more; R ballots for 32 tokens, twice.

#include "ep/cuda/high_throughput_kernels.hpp"
#include "ep/cuda/kernel.cuh"

namespace expertwire::ep::cuda {

// Config -----------------------------------------------------------------------------------------

namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAll = 0xFFFFFFFFU;

// Params -----------------------------------------------------------------------------------------

using Params = NotifyParams;

/// Behind it: rows of each expert [E], and rows of each (warp, rank) [kWarps, R].
struct Shared {
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

__device__ void note_invalid_id(const Params& p, std::int64_t i) {
  HostWords& host = *p.context.host;
  atomicAdd_system(&host.invalid_ids, 1ULL);
  if (atomicCAS_system(reinterpret_cast<unsigned long long*>(&host.first_invalid_at), 0ULL,
                       static_cast<unsigned long long>(i) + 1) == 0)
    host.first_invalid_id = p.ids.wide ? static_cast<const std::int64_t*>(p.ids.data)[i]
                                       : static_cast<const std::int32_t*>(p.ids.data)[i];
}

constexpr int kAtOnce = 8;  // loads that a lane has in flight

/// Takes the experts of a token into the handle, counts them, and returns the ranks that hold them.
__device__ RankSet take_experts(const Params& p, Shared& s, int token) {
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
      if (!valid[k]) note_invalid_id(p, first + base + k);
      p.routing.experts[first + base + k] = experts[k];
      if (experts[k] < 0) continue;
      atomicAdd(&expert_rows(&s)[experts[k]], 1);
      ranks.add(p.shape.placement.rank_of(experts[k]));
    }
  }
  return ranks;
}

/// The ranks of a token again, from the handle.
__device__ RankSet ranks_of(const Params& p, int token) {
  const std::int64_t first = static_cast<std::int64_t>(token) * p.shape.top_k;
  RankSet ranks;
  for (int base = 0; base < p.shape.top_k; base += kAtOnce) {
    std::int32_t experts[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      experts[k] = base + k < p.shape.top_k ? p.routing.experts[first + base + k] : -1;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      if (experts[k] >= 0) ranks.add(p.shape.placement.rank_of(experts[k]));
  }
  return ranks;
}

/// Gives every token its rows; one pass to count, one to place.
__device__ void plan(const Params& p, Shared& s) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int size = p.context.size, width = p.shape.width;
  std::int32_t* mine = warp_rows(p, &s) + warp * size;
  const Part tokens = part_of(p.tokens, warp, kWarps);
  for (int i = threadIdx.x; i < p.shape.placement.experts; i += kThreads) expert_rows(&s)[i] = 0;
  for (int rank = lane; rank < size; rank += 32) mine[rank] = 0;
  __syncthreads();
  for (int first = tokens.begin; first < tokens.end; first += 32) {
    const int token = first + lane;
    RankSet ranks;
    if (token < tokens.end) ranks = take_experts(p, s, token);
    for (int rank = 0; rank < size; ++rank) {
      const unsigned going = __ballot_sync(kAll, ranks.has(rank));
      if (lane == 0) mine[rank] += __popc(going);
    }
  }
  __syncthreads();
  for (int rank = threadIdx.x; rank < size; rank += kThreads) {
    std::int32_t sum = 0;
    for (int w = 0; w < kWarps; ++w) {
      std::int32_t& rows = warp_rows(p, &s)[w * size + rank];
      const std::int32_t count = rows;
      rows = sum;
      sum += count;
    }
    p.routing.rows_to[rank] = sum;
  }
  __syncthreads();
  for (int first = tokens.begin; first < tokens.end; first += 32) {
    const int token = first + lane;
    RankSet ranks;
    if (token < tokens.end) ranks = ranks_of(p, token);
    Destination* list = p.routing.destinations + static_cast<std::int64_t>(token) * width;
    int found = 0;
    for (int rank = 0; rank < size; ++rank) {
      const unsigned going = __ballot_sync(kAll, ranks.has(rank));
      if (going == 0) continue;
      const std::int32_t before = mine[rank];
      __syncwarp();
      if (ranks.has(rank)) list[found++] = {rank, before + __popc(going & ((1U << lane) - 1))};
      if (lane == 0) mine[rank] = before + __popc(going);
      __syncwarp();
    }
    if (token < tokens.end)
      for (; found < width; ++found) list[found] = {-1, -1};
  }
  __syncthreads();
}

// Roles: counts ----------------------------------------------------------------------------------

__device__ void send_counts(const Params& p, Shared& s, Epoch n) {
  const Context& c = p.context;
  const int size = c.size, local = p.shape.placement.local_experts();
  const int entries = 1 + size + local;
  for (int i = threadIdx.x; i < size * entries; i += kThreads) {
    const int peer = i / entries, entry = i % entries;
    std::int32_t value = p.strict ? -1 - p.capacity : p.capacity;
    if (entry > size)
      value = expert_rows(&s)[peer * local + entry - 1 - size];
    else if (entry > 0)
      value = p.routing.rows_to[entry - 1];
    at<std::int32_t>(c, peer, p.shape.slots.counts_of(n, c.rank))[entry] = value;
  }
  __syncthreads();
  for (int peer = threadIdx.x; peer < size; peer += kThreads)
    publish<KernelAccess>(at<Epoch>(c, peer, p.shape.slots.count_flag_of(n, c.rank)), n);
}

/// Sums up what all ranks told. False if they disagree about capacities.
__device__ bool sum_up(const Params& p, Shared& s, Epoch n) {
  const Context& c = p.context;
  const HighThroughputRouting& r = p.routing;
  auto counts_from = [&](int source) {
    return at<const std::int32_t>(c, c.rank, p.shape.slots.counts_of(n, source));
  };
  bool agree = true, overflow = false;
  for (int to = threadIdx.x; to < c.size; to += kThreads) {
    const std::int32_t told = counts_from(to)[0];
    if ((told < 0) != p.strict) {
      report_failure(c, ErrorCode::mismatch, to, Phase::counts, n, 0);
      agree = false;
    }
    const std::int32_t capacity = told < 0 ? -1 - told : told;
    std::int64_t sum = 0;
    for (int source = 0; source < c.size; ++source) {
      if (source == c.rank) r.first_at[to] = static_cast<std::int32_t>(sum);
      sum += counts_from(source)[1 + to];
    }
    overflow = overflow || (p.strict && sum > capacity);
    r.capacity[to] = capacity;
    r.rows_from[to] = counts_from(to)[1 + c.rank];
  }
  if (threadIdx.x == 0) {
    std::int32_t sum = 0;
    for (int source = 0; source < c.size; ++source) {
      r.first_from[source] = sum;
      sum += counts_from(source)[1 + c.rank];
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
        value += at<const std::int32_t>(
            c, c.rank, p.shape.slots.counts_of(n, source))[1 + c.size + i - c.size];
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

}  // namespace

// Kernel -----------------------------------------------------------------------------------------

namespace high_throughput {

__global__ void __launch_bounds__(kThreads, 1) notify(const __grid_constant__ NotifyParams p) {
  extern __shared__ __align__(16) std::byte memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Context& c = p.context;
  const auto lane = direction(c, p.shape.slots.dispatch);
  const Entry entry = enter(c, lane);
  if (!entry.usable) return;
  if (p.release != nullptr) {
    for (int peer = threadIdx.x; peer < c.size; peer += kThreads)
      grant<KernelAccess>(at<Epoch>(c, peer, p.shape.slots.dispatch.consumed) + c.rank, *p.release);
    return;
  }
  const Epoch n = entry.send;
  plan(p, shared);
  if (stops(c, Phase::credit) || !await_credits(c, lane, n)) return;
  if (stops(c, Phase::counts)) return;
  send_counts(p, shared, n);
  if (!await_flags(
          c, Phase::counts, n, [&](int source) { return p.shape.slots.count_flag_of(n, source); },
          [](int) { return true; }))
    return;
  if (!sum_up(p, shared, n)) return;
  if (p.mirror.values != nullptr) mirror(p, shared, n);
}

}  // namespace high_throughput

// Launch -----------------------------------------------------------------------------------------

namespace {

std::size_t shared_bytes(int experts, int ranks) {
  return sizeof(Shared) + static_cast<std::size_t>(experts + kWarps * ranks) * sizeof(std::int32_t);
}

}  // namespace

cudaError_t launch(const NotifyParams& params, cudaStream_t stream) {
  high_throughput::notify<<<
      1, kThreads, shared_bytes(params.shape.placement.experts, params.context.size), stream>>>(
      params);
  return cudaGetLastError();
}

cudaError_t prepare_high_throughput_notify() {
  return cudaFuncSetAttribute(high_throughput::notify, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(shared_bytes(kMostExperts, kMostRanks)));
}

}  // namespace expertwire::ep::cuda
