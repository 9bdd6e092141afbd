#pragma once

// How a block of low-latency dispatch plans its tokens: from the selections of all tokens before
// them it follows which row and which position each gets. The plan makes the header of their rows.

#include "ep/cuda/kernel/counting.cuh"
#include "ep/cuda/kernel/team.cuh"
#include "ep/cuda/low_latency/kernels.hpp"

namespace expertwire::inline v0::ep::cuda {

/// The plan of a batch of tokens, in shared memory.
struct Plan {
  std::int32_t experts[kMostImages][kMostTopK];
  float weights[kMostImages][kMostTopK];
  Destination destinations[kMostImages][kMostTopK];
  /// Where the rows go, null: nowhere, and their flags. Every rank begins with another destination.
  std::byte* rows[kMostImages][kMostTopK];
  Epoch* flags[kMostImages][kMostTopK];
};

/// Plans one token whose experts are in the plan already, adds it to what is `so_far`, and makes
/// the header of its row; one warp. If the block `keeps_own` rows, they go nowhere.
__device__ inline void plan_token(const LowLatencyDispatchParams& p, Plan& plan,
                                  const Counters& so_far, int b, int token, Epoch n, bool keeps_own,
                                  RowHeader* header) {
  const int lane = static_cast<int>(threadIdx.x) % 32, top_k = p.shape.top_k;
  const unsigned before = (1U << lane) - 1;
  const std::int32_t expert = lane < top_k ? plan.experts[b][lane] : -1;
  const std::int32_t rank = expert < 0 ? -1 : p.shape.placement.rank_of(expert);
  unsigned same_expert = 0, same_rank = 0;  // a match of all lanes takes longer
#pragma unroll 1
  for (int k = 0; k < top_k; ++k) {
    same_expert |= __shfl_sync(kAllLanes, expert, k) == expert ? 1U << k : 0U;
    same_rank |= __shfl_sync(kAllLanes, rank, k) == rank ? 1U << k : 0U;
  }
  const bool leads_expert = expert >= 0 && (same_expert & before) == 0;
  const bool leads_rank = rank >= 0 && (same_rank & before) == 0;
  std::int32_t position = -1;
  if (expert >= 0) position = so_far.experts[expert] + __popc(same_expert & before);
  const unsigned leaders = __ballot_sync(kAllLanes, leads_rank);
  // Destinations go in ascending order of rank: each behind those that are lower.
  int place = 0;
#pragma unroll 1
  for (int base = 0; base < p.context.size; base += 32) {
    const int bit = rank - base;
    const unsigned ranks = __reduce_or_sync(kAllLanes, bit >= 0 && bit < 32 ? 1U << bit : 0U);
    if (bit > 0) place += __popc(bit < 32 ? ranks & ((1U << bit) - 1) : ranks);
  }
  if (lane < top_k)
    reinterpret_cast<Selection*>(header + 1)[lane] = {expert, position, plan.weights[b][lane]};
  if (lane == 0) header->token = token;
  if (lane < p.shape.width && lane >= __popc(leaders)) plan.destinations[b][lane] = {-1, -1};
  if (leads_rank) plan.destinations[b][place] = {rank, so_far.ranks[rank]++};
  __syncwarp();
  if (leads_expert) so_far.experts[expert] += __popc(same_expert);
  if (lane < top_k) p.routing.experts[static_cast<std::int64_t>(token) * top_k + lane] = expert;
  const Context& c = p.context;
  if (lane < p.shape.width) {
    const LowLatencySlots& slots = p.shape.slots;
    const Destination to = plan.destinations[b][lane];
    p.routing.destinations[static_cast<std::int64_t>(token) * p.shape.width + lane] = to;
    const int turned = lane - p.shape.turn, i = turned < 0 ? turned + p.shape.width : turned;
    const bool any = to.rank >= 0 && !(keeps_own && to.rank == c.rank);
    plan.rows[b][i] = any ? outbox<std::byte>(c, to.rank, slots.row_of(n, to.row)) : nullptr;
    if (any) plan.flags[b][i] = outbox<Epoch>(c, to.rank, slots.row_flag_of(n, to.row));
  }
  __syncwarp();
}

/// A selection of a batch; a thread has one.
struct PlannedSelection {
  std::int32_t expert = -1;
  float weight = 1;
};
__device__ inline PlannedSelection load_selection(const LowLatencyDispatchParams& p,
                                                  const Part& tokens) {
  const auto i = static_cast<int>(threadIdx.x);
  static_assert(kMostImages * kMostTopK <= Block::kWorkers);
  PlannedSelection mine;
  if (i >= (tokens.end - tokens.begin) * p.shape.top_k) return mine;
  const std::int64_t at = static_cast<std::int64_t>(tokens.begin) * p.shape.top_k + i;
  bool valid = true;
  mine.expert = p.ids.at(at, p.shape.placement.experts, &valid);
  if (p.topk_weights != nullptr) mine.weight = p.topk_weights[at];
  return mine;
}
/// Puts it into the plan.
__device__ inline void take_selection(const LowLatencyDispatchParams& p, Plan& plan,
                                      const Part& tokens, const PlannedSelection& mine) {
  const auto i = static_cast<int>(threadIdx.x);
  if (i >= (tokens.end - tokens.begin) * p.shape.top_k) return;
  const int b = p.shape.by_top_k.quotient(i), k = i - b * p.shape.top_k;
  plan.experts[b][k] = mine.expert;
  plan.weights[b][k] = mine.weight;
}

}  // namespace expertwire::ep::cuda
