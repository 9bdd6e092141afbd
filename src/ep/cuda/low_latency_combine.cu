// Low-latency combine: each rank sums what its experts made of a token and sends one partial sum
// home, where at most min(K, R) of them are added.
//
// Roles. The first block ships the weights if dispatch did not have them. A team sums one row that
// came from another rank and writes the partial sum into that rank's slot. Then the whole block
// adds the partial sums of one token after another; the own rank's share is made there, without a
// slot.
//
// Who writes what. Slot regions [slot][expert rank] of a rank are written by that expert rank
// alone, a row by one team; an output token by one block.
//
// Memory order. As in dispatch: stores of the team, barrier, release of the row's flag; acquire by
// one thread, barrier, loads. Weights have one flag a source. A rank has read the weights of an
// epoch before its partial sums of that epoch arrive here, so their slot is free two epochs later
// without a credit of its own.
//
// Cost. Reads T * K rows of y in all, sends T * (distinct ranks) rows, reads them once.

#include "ep/cuda/kernel.cuh"
#include "ep/cuda/low_latency_kernels.hpp"
#include "ep/cuda/team.cuh"
#include "ep/cuda/vectors.cuh"

namespace expertwire::ep::cuda {

// Config -----------------------------------------------------------------------------------------

namespace {

constexpr int kMostTopK = 32;

// Params -----------------------------------------------------------------------------------------

using Params = LowLatencyCombineParams;

/// What a team knows of the row or token that it sums, in shared memory.
struct TeamWords {
  const std::byte* rows[kMostTopK];  // expert outputs of a row, in top-k order
  float weights[kMostTopK];
  int count;
  const std::byte* parts[kMostTopK];  // partial sums of a token, ascending ranks; null: the own
  int part_count;
  bool good;
};

struct Shared {
  TeamWords teams[Team::kPerBlock];
  std::int32_t first_row[kMostRanks + 1];  // of each source, in the order of items
};

// Roles: weights ---------------------------------------------------------------------------------

/// Ships the weights of this rank's tokens to the ranks that sum for them; the first block.
__device__ void send_weights(const Params& p, Epoch n) {
  const Context& c = p.context;
  const int width = p.shape.width, top_k = p.shape.top_k;
  for (int i = threadIdx.x; i < p.tokens * width; i += blockDim.x) {
    const Destination to = p.routing.destinations[i];
    if (to.rank < 0) continue;
    const std::int64_t first = static_cast<std::int64_t>(i / width) * top_k;
    float* weights = at<float>(c, to.rank, p.shape.slots.weights_of(n, c.rank, to.row));
    for (int k = 0; k < top_k; ++k) {
      const std::int32_t expert = p.routing.experts[first + k];
      if (expert >= 0 && p.shape.placement.rank_of(expert) == to.rank)
        *weights++ = p.topk_weights[first + k];
    }
  }
  __syncthreads();
  for (int peer = threadIdx.x; peer < c.size; peer += blockDim.x)
    publish<KernelAccess>(at<Epoch>(c, peer, p.shape.slots.weight_flag_of(n, c.rank)), n);
}

__device__ bool await_weights(const Params& p, Epoch n) {
  return await_flags(
      p.context, Phase::combine_weights, n,
      [&](int source) { return p.shape.slots.weight_flag_of(n, source); },
      [&](int source) { return p.routing.rows_from[source] > 0; });
}

// Roles: partial sums ----------------------------------------------------------------------------

/// Collects the expert outputs of a row, with their weights; one warp.
__device__ void find_rows(const Params& p, TeamWords& team, int source, int row, Epoch n) {
  const LowLatencySlots& slots = p.shape.slots;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t entry =
      (static_cast<std::int64_t>(source) * static_cast<std::int64_t>(slots.sizes.max_tokens) +
       row) *
      p.shape.top_k;
  std::int32_t place = LowLatencyRouting::kEnd;
  float weight = 0;
  if (lane < p.shape.top_k) {
    place = p.routing.copies[entry + lane];
    if (place >= 0)
      weight = p.topk_weights != nullptr ? at<const float>(p.context, p.context.rank,
                                                           slots.weights_of(n, source, row))[lane]
                                         : p.routing.weights[entry + lane];
  }
  const unsigned present = __ballot_sync(0xFFFFFFFFU, place >= 0);  // dropped ones are left out
  if (place >= 0) {
    const int i = __popc(present & ((1U << lane) - 1));
    team.rows[i] = p.y + static_cast<std::uint64_t>(place) * slots.sizes.row_bytes;
    team.weights[i] = weight;
  }
  if (lane == 0) team.count = __popc(present);
}

/// Adds the weighted vectors `v`, `v` + Team::kThreads, ... below `vectors` of all rows to `acc`.
template <class Element, int kHeld>
__device__ __forceinline__ void add_rows(const TeamWords& team, int v, int vectors,
                                         float (*acc)[Element::kLanes]) {
  for (int r = 0; r < team.count; ++r) {
    const auto* row = reinterpret_cast<const uint4*>(team.rows[r]) + v;
    uint4 held[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (v + i * Team::kThreads < vectors) held[i] = row[i * Team::kThreads];
    const float weight = team.weights[r];
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (v + i * Team::kThreads < vectors) Element::add(weight, held[i], acc[i]);
  }
}

template <class Element>
__device__ void sum_partial(const Params& p, const Team& team, const TeamWords& words,
                            std::byte* out) {
  constexpr int kHeld = 2;
  const auto vectors = static_cast<int>(p.shape.slots.sizes.row_bytes / sizeof(uint4));
  for (int v = team.thread; v < vectors; v += kHeld * Team::kThreads) {
    float acc[kHeld][Element::kLanes] = {};
    add_rows<Element, kHeld>(words, v, vectors, acc);
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (v + i * Team::kThreads < vectors)
        reinterpret_cast<uint4*>(out)[v + i * Team::kThreads] = Element::round(acc[i]);
  }
}

template <class Element>
__device__ bool send(const Params& p, Shared& s, Epoch n, const Direction<KernelAccess>& lane) {
  const Context& c = p.context;
  const LowLatencySlots& slots = p.shape.slots;
  if (stops(c, Phase::combine_weights)) return false;
  if (p.topk_weights != nullptr && blockIdx.x == 0) send_weights(p, n);
  if (threadIdx.x == 0) {  // items start behind this rank, so that ranks do not all write to one
    std::int32_t sum = 0;
    for (int i = 1; i < c.size; ++i) {
      s.first_row[i] = sum;
      sum += p.routing.rows_from[(c.rank + i) % c.size];
    }
    s.first_row[c.size] = sum;
  }
  __syncthreads();
  if (s.first_row[c.size] > 0) {
    if (stops(c, Phase::credit) || !await_credits(c, lane, n)) return false;
    if (p.topk_weights != nullptr && !await_weights(p, n)) return false;
  }
  if (stops(c, Phase::combine_rows)) return false;
  const Team team;
  TeamWords& words = s.teams[team.in_block];
  const int rows = s.first_row[c.size];
  int i = 1;
  for (int base = 0; base < rows; base += Team::count()) {  // all teams meet at the same barriers
    const int item = base + team.index();
    const bool mine = item < rows;
    while (mine && item >= s.first_row[i + 1]) ++i;
    const int source = (c.rank + i) % c.size, row = item - s.first_row[i];
    if (mine && team.first_warp()) find_rows(p, words, source, row, n);
    team.sync();
    if (mine)
      sum_partial<Element>(p, team, words,
                           at<std::byte>(c, source, slots.partial_of(n, c.rank, row)));
    team.sync();
    if (mine && team.thread == 0)
      publish<KernelAccess>(at<Epoch>(c, source, slots.partial_flag_of(n, c.rank, row)), n);
  }
  leave_send(lane, n);
  return true;
}

// Roles: tokens ----------------------------------------------------------------------------------

/// Waits for the partial sums of a token and collects them; the block's first warp. The own rank's
/// is null here: its expert outputs are collected instead.
__device__ bool find_parts(const Params& p, TeamWords& team, int token, Epoch n) {
  const Context& c = p.context;
  const LowLatencySlots& slots = p.shape.slots;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Destination from{-1, -1};
  if (lane < p.shape.width)
    from = p.routing.destinations[static_cast<std::int64_t>(token) * p.shape.width + lane];
  bool good = true;
  if (from.rank >= 0 && from.rank != c.rank) {
    const auto* flag = at<Epoch>(c, c.rank, slots.partial_flag_of(n, from.rank, from.row));
    good = wait_until(c, from.rank, Phase::combine_rows, static_cast<std::uint64_t>(from.row),
                      [&] { return arrived<KernelAccess>(flag, n); });
    team.parts[lane] = at<const std::byte>(c, c.rank, slots.partial_of(n, from.rank, from.row));
  } else {
    team.parts[lane] = nullptr;
  }
  const unsigned all = __ballot_sync(0xFFFFFFFFU, from.rank >= 0);
  const unsigned own = __ballot_sync(0xFFFFFFFFU, from.rank == c.rank);
  if (lane == 0) team.part_count = __popc(all);
  if (own != 0)
    find_rows(p, team, c.rank, __shfl_sync(0xFFFFFFFFU, from.row, __ffs(static_cast<int>(own)) - 1),
              n);
  return __all_sync(0xFFFFFFFFU, good);
}

/// Sums one vector of a token over its ranks. Parts are loaded kInFlight at a time.
template <class Element>
__device__ __forceinline__ uint4 sum_parts(const TeamWords& words, const uint4* bias, int v) {
  float acc[Element::kLanes] = {};
  if (bias != nullptr) Element::add(1.0F, bias[v], acc);
  for (int first = 0; first < words.part_count; first += kInFlight) {
    uint4 vectors[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (first + i < words.part_count && words.parts[first + i] != nullptr)
        vectors[i] = reinterpret_cast<const uint4*>(words.parts[first + i])[v];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i >= words.part_count) continue;
      if (words.parts[first + i] == nullptr) {
        float own[1][Element::kLanes] = {};
        add_rows<Element, 1>(words, v, v + 1, own);
        vectors[i] = Element::round(own[0]);
      }
      Element::add(1.0F, vectors[i], acc);
    }
  }
  return Element::round(acc);
}

template <class Element>
__device__ void sum_token(const Params& p, const TeamWords& words, int token) {
  const std::uint64_t row_bytes = p.shape.slots.sizes.row_bytes;
  const std::uint64_t offset = static_cast<std::uint64_t>(token) * row_bytes;
  const auto* bias = p.bias != nullptr ? reinterpret_cast<const uint4*>(p.bias + offset) : nullptr;
  auto* out = reinterpret_cast<uint4*>(p.out + offset);
  const auto vectors = static_cast<int>(row_bytes / sizeof(uint4));
  for (int v = threadIdx.x; v < vectors; v += blockDim.x)
    out[v] = sum_parts<Element>(words, bias, v);
}

template <class Element>
__device__ void receive(const Params& p, Shared& s, Epoch n, const Direction<KernelAccess>& lane) {
  const Context& c = p.context;
  __syncthreads();
  // The own rank's rows need their weights, too; on one rank alone nobody has waited for them yet.
  if (p.topk_weights != nullptr && !await_weights(p, n)) return;
  TeamWords& words = s.teams[0];
  for (int token = blockIdx.x; token < p.tokens; token += gridDim.x) {
    if (threadIdx.x < 32) {
      const bool found = find_parts(p, words, token, n);
      if (threadIdx.x == 0) words.good = found;
      __syncwarp();
    }
    __syncthreads();
    if (!words.good) return;
    sum_token<Element>(p, words, token);
    __syncthreads();
  }
  if (stops(c, Phase::release)) return;
  leave_receive(c, lane, p.shape.slots.combine, n, false);
}

template <class Element>
__device__ void run(const Params& p, Shared& shared) {
  const auto lane = direction(p.context, p.shape.slots.combine);
  const Entry entry = enter(p.context, lane);
  if (!entry.usable) return;
  if ((p.halves & kSendHalf) != 0 && !send<Element>(p, shared, entry.send, lane)) return;
  if ((p.halves & kReceiveHalf) != 0) receive<Element>(p, shared, entry.receive, lane);
}

}  // namespace

// Kernel -----------------------------------------------------------------------------------------

namespace low_latency {

__global__ void __launch_bounds__(Team::kBlockThreads, 1)
    combine(const __grid_constant__ LowLatencyCombineParams p) {
  __shared__ Shared shared;
  if (p.shape.dtype == DType::bf16)
    run<Bf16>(p, shared);
  else
    run<Fp32>(p, shared);
}

}  // namespace low_latency

// Launch -----------------------------------------------------------------------------------------

cudaError_t launch(const LowLatencyCombineParams& params, const Launch& launch) {
  low_latency::combine<<<launch.blocks, Team::kBlockThreads, 0, launch.stream>>>(params);
  return cudaGetLastError();
}

cudaError_t prepare_low_latency_dispatch();

cudaError_t prepare_low_latency() {
  cudaFuncAttributes attributes{};
  const cudaError_t result = cudaFuncGetAttributes(&attributes, low_latency::combine);
  return result != cudaSuccess ? result : prepare_low_latency_dispatch();
}

}  // namespace expertwire::ep::cuda
