// Low-latency dispatch: one row per (token, rank) over the wire, expanded to experts on arrival.
//
// Roles. A block owns contiguous tokens and plans them: it counts the selections of all tokens
// before its own, so that the row and position of each of its tokens follow without asking anybody.
// The last block has counted nearly everything by then; it sends the counts. After that the block
// is four teams. A team writes whole rows (one per token and destination), then expands whole rows
// as they arrive.
//
// Who writes what. Slot regions [slot][source] of a rank are written by that source alone, a row by
// one team; outputs and the handle's entries of a row by the team that expands it; counts and
// ranges by the first block.
//
// Memory order. Rows: stores of the team, barrier, release of the row's flag at system scope; the
// receiver's thread 0 acquires the flag, barrier, loads. Slots are written after a credit was
// acquired, and the credit is released by the last block to finish, after a barrier and an acq_rel
// count of all blocks. The own rank's rows carry a header through the slot; their payload is read
// from x, which must not change until the receive half is done.
//
// Cost. T * (distinct ranks) rows of the wire and T * K rows written by receivers; every block
// reads topk_idx[0, end of its tokens); a row waits for one flag, and costs three barriers of 256
// threads.

#include "ep/cuda/kernel.cuh"
#include "ep/cuda/low_latency_kernels.hpp"
#include "ep/cuda/team.cuh"
#include "ep/cuda/vectors.cuh"

namespace expertwire::ep::cuda {

// Config -----------------------------------------------------------------------------------------

namespace {

constexpr int kMostTopK = 32;
constexpr int kBatch = 32;  // tokens that a block plans at a time
constexpr unsigned kAllLanes = 0xFFFFFFFFU;

// Params -----------------------------------------------------------------------------------------

using Params = LowLatencyDispatchParams;

/// The plan of a batch of tokens, in shared memory.
struct Plan {
  std::int32_t experts[kBatch][kMostTopK];
  std::int32_t positions[kBatch][kMostTopK];  // index among my selections of that expert
  Destination destinations[kBatch][kMostTopK];
};

/// What a team knows of the row that it expands.
struct Expansion {
  void* places[kMostTopK];
  std::int32_t copies;
  std::int32_t token;
  bool good;
};

struct Shared {
  Plan plan;
  Expansion rows[Team::kPerBlock];
  std::int32_t rows_to_rank[kMostRanks];       // send: so far
  std::int32_t total_to_rank[kMostRanks + 1];  // send: in all; receive: rows before each source's
};

/// Counters of experts lie behind Shared: [E] so far, [E] in all. The receive half keeps the first
/// place of each (source, local expert) in the former.
__device__ std::int32_t* expert_counters(Shared* shared) {
  return reinterpret_cast<std::int32_t*>(shared + 1);
}

// Roles: planner ---------------------------------------------------------------------------------

__device__ std::int32_t expert_at(const Params& p, int i) {
  bool valid = true;
  return p.ids.at(i, p.shape.placement.experts, &valid);
}

/// Remembers ids that are out of range; they count as "no selection".
__device__ void note_invalid_ids(const Params& p) {
  for (int i = threadIdx.x; i < p.tokens * p.shape.top_k; i += blockDim.x) {
    bool valid = true;
    p.ids.at(i, p.shape.placement.experts, &valid);
    if (valid) continue;
    HostWords& host = *p.context.host;
    atomicAdd_system(&host.invalid_ids, 1ULL);
    if (atomicCAS_system(reinterpret_cast<unsigned long long*>(&host.first_invalid_at), 0ULL,
                         static_cast<unsigned long long>(i) + 1) == 0)
      host.first_invalid_id = p.ids.wide ? static_cast<const std::int64_t*>(p.ids.data)[i]
                                         : static_cast<const std::int32_t*>(p.ids.data)[i];
  }
}

/// Counts selections [0, tokens) into `experts` and `ranks`; a token counts once a rank.
__device__ void count_tokens(const Params& p, int tokens, std::int32_t* experts,
                             std::int32_t* ranks) {
  const int top_k = p.shape.top_k;
  for (int i = threadIdx.x; i < tokens * top_k; i += blockDim.x) {
    const std::int32_t expert = expert_at(p, i);
    if (expert < 0) continue;
    atomicAdd(&experts[expert], 1);
    const std::int32_t rank = p.shape.placement.rank_of(expert);
    bool first = true;
    for (int j = i - i % top_k; j < i && first; ++j) {
      const std::int32_t other = expert_at(p, j);
      first = other < 0 || p.shape.placement.rank_of(other) != rank;
    }
    if (first) atomicAdd(&ranks[rank], 1);
  }
}

/// Plans one token whose experts are in the plan already; one warp.
__device__ void plan_token(const Params& p, Shared& s, int b, int token) {
  const int lane = static_cast<int>(threadIdx.x), top_k = p.shape.top_k;
  const unsigned before = (1U << lane) - 1;
  std::int32_t* so_far = expert_counters(&s);
  const std::int32_t expert = lane < top_k ? s.plan.experts[b][lane] : -1;
  const std::int32_t rank = expert < 0 ? -1 : p.shape.placement.rank_of(expert);
  const unsigned same_expert = __match_any_sync(kAllLanes, expert);
  const unsigned same_rank = __match_any_sync(kAllLanes, rank);
  const bool leads_expert = expert >= 0 && (same_expert & before) == 0;
  const bool leads_rank = rank >= 0 && (same_rank & before) == 0;
  std::int32_t position = -1;
  if (expert >= 0) position = so_far[expert] + __popc(same_expert & before);
  // Destinations go in ascending order of rank.
  const unsigned leaders = __ballot_sync(kAllLanes, leads_rank);
  int place = 0;
  for (unsigned rest = leaders; rest != 0; rest &= rest - 1) {
    const std::int32_t other = __shfl_sync(kAllLanes, rank, __ffs(static_cast<int>(rest)) - 1);
    place += other < rank ? 1 : 0;
  }
  if (lane < top_k) s.plan.positions[b][lane] = position;
  if (lane < p.shape.width && lane >= __popc(leaders)) s.plan.destinations[b][lane] = {-1, -1};
  if (leads_rank) s.plan.destinations[b][place] = {rank, s.rows_to_rank[rank]++};
  __syncwarp();
  if (leads_expert) so_far[expert] += __popc(same_expert);
  __syncwarp();
  if (lane < p.shape.width)
    p.routing.destinations[static_cast<std::int64_t>(token) * p.shape.width + lane] =
        s.plan.destinations[b][lane];
  if (lane < top_k) p.routing.experts[static_cast<std::int64_t>(token) * top_k + lane] = expert;
}

// Roles: sender ----------------------------------------------------------------------------------

/// Counts go to every rank, zeros too, before any row of this block.
__device__ void send_counts(const Params& p, Shared& s, Epoch n) {
  const Context& c = p.context;
  const LowLatencySlots& slots = p.shape.slots;
  const int local = p.shape.placement.local_experts(), experts = p.shape.placement.experts;
  std::int32_t* total = expert_counters(&s) + experts;
  for (int i = threadIdx.x; i < experts; i += blockDim.x) total[i] = 0;
  for (int i = threadIdx.x; i < c.size; i += blockDim.x) s.total_to_rank[i] = 0;
  __syncthreads();
  count_tokens(p, p.tokens, total, s.total_to_rank);
  note_invalid_ids(p);
  __syncthreads();
  for (int i = threadIdx.x; i < experts + c.size; i += blockDim.x) {
    const int peer = i < experts ? i / local : i - experts;
    auto* counts = at<std::int32_t>(c, peer, slots.counts_of(n, c.rank));
    if (i < experts)
      counts[1 + i % local] = total[i];
    else
      counts[0] = s.total_to_rank[peer];
  }
  __syncthreads();
  for (int peer = threadIdx.x; peer < c.size; peer += blockDim.x)
    publish<KernelAccess>(at<Epoch>(c, peer, slots.count_flag_of(n, c.rank)), n);
}

/// Writes one row, header and payload; one team.
__device__ void write_row(const Params& p, const Plan& plan, const Team& team, int b, int token,
                          const Destination& to, Epoch n) {
  const Context& c = p.context;
  const LowLatencySlots& slots = p.shape.slots;
  auto* header = at<RowHeader>(c, to.rank, slots.row_of(n, c.rank, to.row));
  if (team.first_warp()) {
    const int k = team.thread;
    const std::int32_t expert = k < p.shape.top_k ? plan.experts[b][k] : -1;
    const bool mine = expert >= 0 && p.shape.placement.rank_of(expert) == to.rank;
    const unsigned all = __ballot_sync(kAllLanes, mine);
    if (mine) {
      const float weight =
          p.topk_weights != nullptr
              ? p.topk_weights[static_cast<std::int64_t>(token) * p.shape.top_k + k]
              : 1.0F;
      auto* selections = reinterpret_cast<Selection*>(header + 1);
      selections[__popc(all & ((1U << k) - 1))] = {p.shape.placement.local_index(expert),
                                                   plan.positions[b][k], weight};
    }
    if (k == 0) *header = {token, __popc(all)};
  }
  if (to.rank != c.rank) {
    void* payload = reinterpret_cast<std::byte*>(header) + slots.header_bytes;
    copy_row(p.x + static_cast<std::uint64_t>(token) * slots.sizes.row_bytes,
             static_cast<int>(slots.sizes.row_bytes / sizeof(uint4)), team.thread, Team::kThreads,
             1, [&](int) { return payload; });
  }
}

/// Sends the rows of a planned batch of tokens. Teams meet at the same number of barriers, whether
/// they have a row or not: racecheck counts on it.
__device__ void send_batch(const Params& p, const Plan& plan, int first, int count, Epoch n) {
  const Context& c = p.context;
  const int width = p.shape.width;
  const Team team;
  for (int base = 0; base < count * width; base += Team::kPerBlock) {
    const int item = base + team.in_block, b = item / width;
    Destination to{-1, -1};
    if (item < count * width) to = plan.destinations[b][(item + c.rank) % width];
    if (to.rank >= 0) write_row(p, plan, team, b, first + b, to, n);
    team.sync();
    if (to.rank >= 0 && team.thread == 0)
      publish<KernelAccess>(at<Epoch>(c, to.rank, p.shape.slots.row_flag_of(n, c.rank, to.row)), n);
  }
}

__device__ bool send(const Params& p, Shared& s, Epoch n, const Direction<KernelAccess>& lane) {
  const Context& c = p.context;
  const int experts = p.shape.placement.experts, top_k = p.shape.top_k;
  const Part own = part_of(p.tokens, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
  const bool counts = blockIdx.x == gridDim.x - 1;
  if (own.begin == own.end && !counts) {
    leave_send(lane, n);
    return true;
  }
  std::int32_t* so_far = expert_counters(&s);
  for (int i = threadIdx.x; i < experts; i += blockDim.x) so_far[i] = 0;
  for (int i = threadIdx.x; i < c.size; i += blockDim.x) s.rows_to_rank[i] = 0;
  __syncthreads();
  count_tokens(p, own.begin, so_far, s.rows_to_rank);
  if (stops(c, Phase::credit) || !await_credits(c, lane, n)) return false;
  if (stops(c, Phase::counts)) return false;
  if (counts) send_counts(p, s, n);
  if (stops(c, Phase::dispatch_rows)) return false;

  for (int first = own.begin; first < own.end; first += kBatch) {
    const int count = min(kBatch, own.end - first);
    __syncthreads();  // the plan before has been used, counters are complete
    for (int i = threadIdx.x; i < count * top_k; i += blockDim.x)
      s.plan.experts[i / top_k][i % top_k] = expert_at(p, first * top_k + i);
    __syncthreads();
    if (threadIdx.x < 32)
      for (int b = 0; b < count; ++b) plan_token(p, s, b, first + b);
    __syncthreads();
    send_batch(p, s.plan, first, count, n);
  }
  leave_send(lane, n);
  return true;
}

// Roles: receiver --------------------------------------------------------------------------------

/// Turns the sources' counts into the first place of each (source, local expert), and into rows
/// before each source's; the first block also writes the outputs that tell it.
__device__ void take_counts(const Params& p, Shared& s, Epoch n) {
  const Context& c = p.context;
  const LowLatencySlots& slots = p.shape.slots;
  const int local = p.shape.placement.local_experts();
  const auto room = static_cast<std::int32_t>(slots.sizes.ranks * slots.sizes.max_tokens);
  std::int32_t* places = expert_counters(&s);
  auto counts_from = [&](int source) {
    return at<const std::int32_t>(c, c.rank, slots.counts_of(n, source));
  };
  for (int e = threadIdx.x; e < local; e += blockDim.x) {
    std::int32_t sum = 0;
    for (int source = 0; source < c.size; ++source) {
      places[source * local + e] = sum;
      const std::int32_t came = counts_from(source)[1 + e], taken = min(came, room - sum);
      if (blockIdx.x == 0) {
        reinterpret_cast<int2*>(p.ranges)[e * c.size + source] = {sum, taken};
        if (came > taken)
          atomicAdd_system(&c.host->dropped_rows, static_cast<unsigned long long>(came - taken));
      }
      sum += taken;
    }
    if (blockIdx.x == 0) p.tokens_per_expert[e] = sum;
  }
  if (threadIdx.x == 0) {
    std::int32_t sum = 0;
    for (int source = 0; source < c.size; ++source) {
      s.total_to_rank[source] = sum;
      sum += counts_from(source)[0];
    }
    s.total_to_rank[c.size] = sum;
  }
  if (blockIdx.x == 0)
    for (int source = threadIdx.x; source < c.size; source += blockDim.x)
      p.routing.rows_from[source] = counts_from(source)[0];
  __syncwarp();
  __syncthreads();
}

/// Finds the places of a row's copies and notes them in the handle; the first warp of a team.
__device__ void find_places(const Params& p, Shared& s, Expansion& row, int source, int index,
                            Epoch n) {
  const LowLatencySlots& slots = p.shape.slots;
  const auto* header =
      at<const RowHeader>(p.context, p.context.rank, slots.row_of(n, source, index));
  const int lane = static_cast<int>(threadIdx.x) % 32, top_k = p.shape.top_k;
  const auto room = static_cast<std::int32_t>(slots.sizes.ranks * slots.sizes.max_tokens);
  const std::int32_t count = header->count, token = header->token;
  const auto* selections = reinterpret_cast<const Selection*>(header + 1);
  void* place = nullptr;
  if (lane < top_k) {
    std::int32_t note = LowLatencyRouting::kEnd;
    float weight = 0;
    if (lane < count) {
      const Selection selection = selections[lane];
      weight = selection.weight;
      const std::int32_t in_expert =
          expert_counters(&s)[source * p.shape.placement.local_experts() + selection.local_expert] +
          selection.position;
      note = LowLatencyRouting::kDropped;
      if (in_expert < room) {
        note = selection.local_expert * room + in_expert;
        place = p.out_x + static_cast<std::uint64_t>(note) * slots.sizes.row_bytes;
        p.source_tokens[note] = token;
      }
    }
    const std::int64_t entry =
        (static_cast<std::int64_t>(source) * static_cast<std::int64_t>(slots.sizes.max_tokens) +
         index) *
            top_k +
        lane;
    p.routing.copies[entry] = note;
    p.routing.weights[entry] = weight;
  }
  row.places[lane] = place;
  if (lane == 0) {
    row.copies = count;
    row.token = token;
  }
}

/// Copies a row to its places; one team.
__device__ void expand_row(const Params& p, const Expansion& row, const Team& team, int source,
                           int index, Epoch n) {
  const LowLatencySlots& slots = p.shape.slots;
  const auto* header =
      at<const RowHeader>(p.context, p.context.rank, slots.row_of(n, source, index));
  const std::byte* payload =
      source == p.context.rank ? p.x + static_cast<std::uint64_t>(row.token) * slots.sizes.row_bytes
                               : reinterpret_cast<const std::byte*>(header) + slots.header_bytes;
  copy_row(payload, static_cast<int>(slots.sizes.row_bytes / sizeof(uint4)), team.thread,
           Team::kThreads, row.copies, [&](int i) { return row.places[i]; });
}

__device__ void receive(const Params& p, Shared& s, Epoch n, const Direction<KernelAccess>& lane) {
  const Context& c = p.context;
  const LowLatencySlots& slots = p.shape.slots;
  __syncthreads();  // shared memory changes hands
  if (!await_flags(
          c, Phase::counts, n, [&](int source) { return slots.count_flag_of(n, source); },
          [](int) { return true; }))
    return;
  take_counts(p, s, n);
  const Team team;
  Expansion& row = s.rows[team.in_block];
  bool good = true;
  int source = 0;
  const int rows = s.total_to_rank[c.size];
  for (int base = 0; base < rows && good; base += Team::count()) {  // barriers as in send_batch
    const int item = base + team.index();
    while (item < rows && item >= s.total_to_rank[source + 1]) ++source;
    const int index = item - s.total_to_rank[source];
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
    if (mine && team.first_warp()) find_places(p, s, row, source, index, n);
    team.sync();
    if (mine) expand_row(p, row, team, source, index, n);
    team.sync();  // the team's words are free again
  }
  if (!__syncthreads_and(good) || stops(c, Phase::release)) return;
  leave_receive(c, lane, slots.dispatch, n, false);
}

}  // namespace

// Kernel -----------------------------------------------------------------------------------------

namespace low_latency {

__global__ void __launch_bounds__(Team::kBlockThreads, 1)
    dispatch(const __grid_constant__ LowLatencyDispatchParams p) {
  extern __shared__ __align__(16) std::byte memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const auto lane = direction(p.context, p.shape.slots.dispatch);
  const Entry entry = enter(p.context, lane);
  if (!entry.usable) return;
  if ((p.halves & kSendHalf) != 0 && !send(p, shared, entry.send, lane)) return;
  if ((p.halves & kReceiveHalf) != 0) receive(p, shared, entry.receive, lane);
}

}  // namespace low_latency

// Launch -----------------------------------------------------------------------------------------

namespace {

std::size_t shared_bytes(int experts) {
  return sizeof(Shared) + 2 * static_cast<std::size_t>(experts) * sizeof(std::int32_t);
}

}  // namespace

cudaError_t launch(const LowLatencyDispatchParams& params, const Launch& launch) {
  low_latency::dispatch<<<launch.blocks, Team::kBlockThreads,
                          shared_bytes(params.shape.placement.experts), launch.stream>>>(params);
  return cudaGetLastError();
}

cudaError_t prepare_low_latency_dispatch() {
  return cudaFuncSetAttribute(low_latency::dispatch, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(shared_bytes(kMostExperts)));
}

}  // namespace expertwire::ep::cuda
