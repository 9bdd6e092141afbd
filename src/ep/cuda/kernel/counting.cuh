#pragma once

// How selections are counted: by a whole block, a lane a selection. A token's selections are never
// split between warps, so that a warp sees which of them is the first to go to a rank.

#include "ep/cuda/kernel/entry.cuh"

namespace expertwire::inline v0::ep::cuda {

/// The selections that a thread looks at: the same one of every `step` tokens.
struct Selections {
  int token, k, step;
  bool active;
  unsigned earlier;  // lanes that have earlier selections of the token

  __device__ Selections(int top_k, const Divider& by_top_k) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int tokens = by_top_k.quotient(32);  // of a warp at a time; K is at most 32
    const int in_warp = by_top_k.quotient(lane), first = in_warp * top_k;
    k = lane - first;
    earlier = ((1U << lane) - 1) & ~((1U << first) - 1);
    token = warp * tokens + in_warp;
    step = static_cast<int>(blockDim.x) / 32 * tokens;
    active = in_warp < tokens;
  }
};

/// Where a block counts: selections of each expert [E], tokens of each rank [R].
struct Counters {
  std::int32_t* experts;
  std::int32_t* ranks;
};

struct CountRequest {
  ExpertIds ids;
  Placement placement;
  int top_k;
  Divider by_top_k;
  int tokens;  ///< count [0, tokens)
  bool note;   ///< remember ids that are out of range
};

inline constexpr std::int32_t kOutOfRange = -2;

/// The expert of selection `k` of a token; -1 if there is none, or kOutOfRange.
__device__ __forceinline__ std::int32_t selection_of(const CountRequest& r, int token, int k) {
  bool valid = true;
  const std::int64_t at = static_cast<std::int64_t>(token) * r.top_k + k;
  const std::int32_t expert = r.ids.at(at, r.placement.experts, &valid);
  return valid ? expert : kOutOfRange;
}

/// The selection that a thread will count first; loaded early, together with other things.
__device__ __forceinline__ std::int32_t peek_selection(const CountRequest& r,
                                                       const Selections& mine) {
  return mine.active && mine.token < r.tokens ? selection_of(r, mine.token, mine.k) : -1;
}

/// All threads of a block call, with what they peeked at.
__device__ __forceinline__ void count_tokens(const Context& context, const CountRequest& r,
                                             const Selections& mine, std::int32_t peeked,
                                             const Counters& counters) {
  constexpr int kAtOnce = 4;  // loads in flight
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // Tokens of rank m * 32 + lane; added up at the end, because all warps count the same few ranks.
  std::int32_t of_rank[kMostRanks / 32] = {};
  // Rank by rank: to match all lanes takes longer.
  auto count = [&](int token, std::int32_t expert) {
    const std::int32_t rank = expert >= 0 ? r.placement.rank_of(expert) : -1;
    if (expert == kOutOfRange && r.note)
      note_invalid_id(context.words->notices, r.ids,
                      static_cast<std::int64_t>(token) * r.top_k + mine.k);
    if (rank >= 0) atomicAdd(&counters.experts[expert], 1);
#pragma unroll 1
    for (unsigned rest = __ballot_sync(kAllLanes, rank >= 0); rest != 0;) {
      const std::int32_t one = __shfl_sync(kAllLanes, rank, __ffs(static_cast<int>(rest)) - 1);
      const unsigned all = __ballot_sync(kAllLanes, rank == one);
      const unsigned tokens = __ballot_sync(kAllLanes, rank == one && (all & mine.earlier) == 0);
      rest &= ~all;
#pragma unroll
      for (int m = 0; m < kMostRanks / 32; ++m)
        if (one == m * 32 + lane) of_rank[m] += __popc(tokens);
    }
  };
  for (int base = 0; base < r.tokens; base += kAtOnce * mine.step) {  // alike on all lanes
    std::int32_t experts[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int token = base + i * mine.step + mine.token;
      if (base == 0 && i == 0)
        experts[i] = peeked;
      else
        experts[i] = mine.active && token < r.tokens ? selection_of(r, token, mine.k) : -1;
    }
    // Not unrolled: short kernels wait for every line of their code.
#pragma unroll 1
    for (int i = 0; i < kAtOnce && base + i * mine.step < r.tokens; ++i) {
      count(base + i * mine.step + mine.token, experts[0]);
#pragma unroll
      for (int j = 0; j + 1 < kAtOnce; ++j) experts[j] = experts[j + 1];
    }
  }
#pragma unroll
  for (int m = 0; m < kMostRanks / 32; ++m)
    if (of_rank[m] > 0) atomicAdd(&counters.ranks[m * 32 + lane], of_rank[m]);
}

}  // namespace expertwire::ep::cuda
