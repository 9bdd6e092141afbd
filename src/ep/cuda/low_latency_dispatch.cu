// Low-latency dispatch: one row per (token, rank) over the wire, expanded to experts on arrival.
//
// Roles. A block owns contiguous tokens and plans them: it counts the selections of all tokens
// before its own, so that the row and position of each of its tokens follow without asking anybody.
// The first block has none before its own; it counts all tokens and sends the counts. After that
// the workers of a block form teams. A team writes a token to all its ranks, token after token;
// then it expands row after row as they arrive, its own rank's first. A warp of its own, the
// announcer, releases the flags of what teams wrote last, and writes the headers of the own rank's
// rows, which can be expanded while the others are on the wire.
//
// Who writes what. Slot regions [slot][source] of a rank are written by that source alone, a row by
// one team; outputs and the handle's entries of a row by the team that expands it; ranges and
// tokens_per_expert by the first block.
//
// Memory order. Counts carry their epoch. Rows: stores of the team, barrier, release of the row's
// flag at system scope by one thread; the receiver's thread 0 acquires the flag, barrier, loads.
// Slots are written after a credit was acquired, and the credit is released by the last block to
// finish, after a barrier and an acq_rel count of all blocks. The own rank's rows carry a header
// through the slot; their payload is read from x, which must not change until the receive half is
// done, unless it is cast on its way.
//
// Cost. T * (distinct ranks) rows of the wire and T * K rows written by receivers; a block reads
// topk_idx up to the end of its tokens, the first all of it. What a block must know from memory is
// asked for at once, before the first barrier: entry words, credit, its selections, and x, which
// comes to registers, or to L2 if it is cast. A row waits for one flag; its header and payload are
// loaded together.

#include "ep/cuda/cast.cuh"
#include "ep/cuda/low_latency_plan.cuh"
#include "ep/cuda/team.cuh"
#include "ep/cuda/vectors.cuh"

namespace expertwire::ep::cuda {

namespace {

// Params -----------------------------------------------------------------------------------------

using Params = LowLatencyDispatchParams;

/// What a team knows of the row that it expands.
struct Expansion {
  std::int32_t places[kMostTopK];  // in the output; below 0: none
  std::int32_t copies;
  bool good;
};

struct Shared {
  Plan plan;
  Expansion rows[Team::kMostPerBlock][2];   // taken in turn
  std::int32_t rows_to_rank[kMostRanks];    // send: so far
  std::int32_t total_to_rank[kMostRanks];   // send, first block: in all
  std::int32_t first_item[kMostRanks + 1];  // receive: rows before each source's, own rank first
};

/// Counters of experts lie behind Shared: [E] so far, [E] in all; then, for the receive half, the
/// first place of each (source, local expert) [E].
__device__ std::int32_t* expert_counters(Shared* shared) {
  return reinterpret_cast<std::int32_t*>(shared + 1);
}

__device__ std::int32_t* first_places(const Params& p, Shared* shared) {
  return expert_counters(shared) + 2 * p.shape.placement.experts;
}

// Roles: sender ----------------------------------------------------------------------------------

/// Counts go to every rank, zeros too; the first block. They need no release: each carries its
/// epoch.
__device__ void send_counts(const Params& p, Shared& s, Epoch n) {
  const Context& c = p.context;
  const LowLatencySlots& slots = p.shape.slots;
  const int local = p.shape.placement.local_experts();
  const int entries = LowLatencySlots::kHeader + local;
  const std::int32_t* total = expert_counters(&s) + p.shape.placement.experts;
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

/// Asks for the rows of tokens that will be cast to be brought to L2; a thread a line.
__device__ void prefetch_rows(const Params& p, const Part& tokens) {
  constexpr std::uint64_t kLine = 128;
  const std::uint64_t row = p.shape.slots.sizes.row_bytes;
  const std::byte* begin = p.x + static_cast<std::uint64_t>(tokens.begin) * row;
  const std::byte* end = p.x + static_cast<std::uint64_t>(tokens.end) * row;
#pragma unroll 1
  for (const std::byte* at = begin + threadIdx.x * kLine; at < end; at += blockDim.x * kLine)
    device::prefetch_l2(at);
}

/// Writes the headers of a token's rows, of those that are headers alone or of the others; one
/// warp.
__device__ void write_headers(const Params& p, const Plan& plan, int b, int token, bool alone,
                              Epoch n) {
  const Context& c = p.context;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int32_t expert = lane < p.shape.top_k ? plan.experts[b][lane] : -1;
  const std::int32_t rank = expert >= 0 ? p.shape.placement.rank_of(expert) : -1;
  Selection selection{};
  if (expert >= 0)
    selection = {p.shape.placement.local_index(expert), plan.positions[b][lane],
                 plan.weights[b][lane]};
#pragma unroll 1
  for (int i = 0; i < p.shape.width; ++i) {
    const Destination to = plan.destinations[b][i];
    if (to.rank < 0) break;
    if (is_header_alone(p, to) != alone) continue;
    auto* header = at<RowHeader>(c, to.rank, p.shape.slots.row_of(n, c.rank, to.row));
    const unsigned all = __ballot_sync(kAllLanes, rank == to.rank);
    if (rank == to.rank)
      reinterpret_cast<Selection*>(header + 1)[__popc(all & ((1U << lane) - 1))] = selection;
    if (lane == 0) *header = {token, __popc(all)};
  }
}

/// The beginning of a token's row, as it goes to other ranks uncast.
__device__ __forceinline__ void load_token(const Params& p, const Team& team, std::int64_t token,
                                           HeldRow& row) {
  row.load(p.x + token * p.format.data_bytes, static_cast<int>(p.format.data_bytes / sizeof(uint4)),
           team.thread, team.threads);
}

/// Writes a token's payload to all its ranks; one team. `row` has been loaded.
__device__ void write_payload(const Params& p, std::byte* const* payloads, const Team& team,
                              std::int64_t token, HeldRow& row) {
  const auto vectors = static_cast<int>(p.format.data_bytes / sizeof(uint4));
  const std::byte* from = p.x + token * p.format.data_bytes;
  copy_held_row(row, from, vectors, team.thread, team.threads, p.shape.width,
                [&](int i) { return payloads[i]; });
#pragma unroll 1
  for (int j = team.thread; j < static_cast<int>(p.format.scales); j += team.threads) {
    const float scale = p.x_scales[token * p.format.scales + j];
#pragma unroll 1
    for (int i = 0; i < p.shape.width; ++i)
      if (std::byte* to = payloads[i])
        reinterpret_cast<float*>(to + p.format.data_bytes)[j] = scale;
  }
}

/// The same, cast to fp8 on its way.
template <class Element>
__device__ void write_cast(const Params& p, std::byte* const* payloads, const Team& team,
                           std::int64_t token) {
  const std::byte* from = p.x + token * static_cast<std::int64_t>(p.shape.slots.sizes.row_bytes);
  auto write = [&](int chunk, const uint4& codes) {
#pragma unroll 1
    for (int i = 0; i < p.shape.width; ++i)
      if (std::byte* to = payloads[i]) reinterpret_cast<uint4*>(to)[chunk] = codes;
  };
  auto write_scale = [&](int index, float scale) {
#pragma unroll 1
    for (int i = 0; i < p.shape.width; ++i)
      if (std::byte* to = payloads[i])
        reinterpret_cast<float*>(to + p.format.data_bytes)[index] = scale;
  };
  cast_row<Element>(from, static_cast<int>(p.format.data_bytes), team.thread, team.threads, write,
                    write_scale);
}

/// A planned batch of tokens of a block.
struct Batch {
  Part tokens;
  const Plan& plan;
  Epoch n;
};

__device__ __forceinline__ int rounds_of(const Part& tokens, const Team& team) {
  return (tokens.end - tokens.begin + team.per_block - 1) / team.per_block;
}

/// Releases the flag of a token's `i`-th row, if that is of the kind.
__device__ __forceinline__ void announce(const Params& p, const Batch& batch, int b, int i,
                                         bool alone) {
  const Context& c = p.context;
  const Destination to = batch.plan.destinations[b][i];
  if (to.rank < 0 || is_header_alone(p, to) != alone) return;
  publish<KernelAccess>(at<Epoch>(c, to.rank, p.shape.slots.row_flag_of(batch.n, c.rank, to.row)),
                        batch.n);
}

/// Sends the tokens of a batch, a team a token. Teams meet at the same number of barriers, whether
/// they have a token or not: racecheck counts on it. The last round is the announcer's. The row of
/// the first token of the team is in `row` already if `loaded`.
__device__ void send_batch(const Params& p, const Batch& batch, const Team& team, HeldRow& row,
                           bool loaded) {
  const int rounds = rounds_of(batch.tokens, team);
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    const int b = round * team.per_block + team.in_block, token = batch.tokens.begin + b;
    const bool mine = token < batch.tokens.end;
    if (mine) {
      std::byte* const* payloads = batch.plan.payloads[b];
      if (!p.cast && !(loaded && round == 0)) load_token(p, team, token, row);
      if (team.first_warp()) write_headers(p, batch.plan, b, token, false, batch.n);
      if (!p.cast)
        write_payload(p, payloads, team, token, row);
      else if (p.shape.dtype == DType::bf16)
        write_cast<Bf16>(p, payloads, team, token);
      else
        write_cast<Fp32>(p, payloads, team, token);
    }
    if (round == rounds - 1) return Block::hand_over();
    team.sync();
    if (mine && team.thread < p.shape.width) announce(p, batch, b, team.thread, false);
  }
}

/// The announcer's part of a batch.
__device__ void announce_batch(const Params& p, const Batch& batch, const Team& team) {
  const int lane = static_cast<int>(threadIdx.x) % 32, width = p.shape.width;
  const int count = batch.tokens.end - batch.tokens.begin;
  if (!p.cast) {
#pragma unroll 1
    for (int b = 0; b < count; ++b)
      write_headers(p, batch.plan, b, batch.tokens.begin + b, true, batch.n);
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < count * width; i += 32)
      announce(p, batch, p.shape.by_width.quotient(i), p.shape.by_width.rest(i), true);
  }
  Block::await_workers();
  const int first = (rounds_of(batch.tokens, team) - 1) * team.per_block;
#pragma unroll 1
  for (int i = lane; i < (count - first) * width; i += 32)
    announce(p, batch, first + p.shape.by_width.quotient(i), p.shape.by_width.rest(i), false);
}

/// The tokens of one block. What is loaded before the first barrier is in flight together.
__device__ Entry send(const Params& p, Shared& s, const Direction<KernelAccess>& lane, bool* good) {
  const Context& c = p.context;
  const int experts = p.shape.placement.experts;
  const bool first = blockIdx.x == 0;
  const Part own = tokens_of_block(p);
  const Team team = Team::for_items(min(own.end - own.begin, kBatch), 1);
  auto batch_at = [&](int begin) -> Part { return {begin, min(begin + kBatch, own.end)}; };
  HeldRow row;
  if (p.cast)
    prefetch_rows(p, batch_at(own.begin));
  else if (!Block::announcer() && own.begin + team.in_block < own.end)
    load_token(p, team, own.begin + team.in_block, row);
  const int before = own.begin < own.end ? own.begin : 0;
  const CountRequest request{
      p.ids, p.shape.placement, p.shape.top_k, p.shape.by_top_k, first ? p.tokens : before, first};
  const Selections mine(p.shape.top_k, p.shape.by_top_k);
  const std::int32_t peeked = peek_selection(request, mine);
  const PlannedSelection planned = load_selection(p, batch_at(own.begin));
  const EntryWords words = peek_entry(c, lane);
  const Epoch credit = peek_credit(c, lane);
  std::int32_t* so_far = expert_counters(&s);
#pragma unroll 1
  for (int i = threadIdx.x; i < 2 * experts; i += blockDim.x) so_far[i] = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < c.size; i += blockDim.x) {
    s.rows_to_rank[i] = 0;
    s.total_to_rank[i] = 0;
  }
  __syncthreads();  // counters are zero; the loads go on
  const Counters counters =
      first ? Counters{so_far + experts, s.total_to_rank} : Counters{so_far, s.rows_to_rank};
  count_tokens(c, request, mine, peeked, counters);
  take_selection(p, s.plan, batch_at(own.begin), planned);
  const Entry entry = enter(words);
  *good = entry.usable && !stops(c, Phase::credit);
  if (!*good) return entry;
  *good = await_credits(c, lane, entry.send, credit) && !stops(c, Phase::counts);
  mark(c, kAdmitted);
  if (!*good) return entry;
  if (first) send_counts(p, s, entry.send);
  *good = !stops(c, Phase::dispatch_rows);
#pragma unroll 1
  for (int begin = own.begin; begin < own.end && *good; begin += kBatch) {
    const Batch batch{batch_at(begin), s.plan, entry.send};
    if (begin > own.begin) {
      __syncthreads();  // the plan before has been used
      take_selection(p, s.plan, batch.tokens, load_selection(p, batch.tokens));
      __syncthreads();
    }
    if (threadIdx.x < 32)
#pragma unroll 1
      for (int token = batch.tokens.begin; token < batch.tokens.end; ++token)
        plan_token(p, s.plan, {so_far, s.rows_to_rank}, token - batch.tokens.begin, token, batch.n);
    __syncthreads();
    if (Block::announcer())
      announce_batch(p, batch, team);
    else
      send_batch(p, batch, team, row, begin == own.begin);
  }
  mark(c, kSent);
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

/// Learns how many rows come from each source, and that they are of the right format; one warp.
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
    std::int32_t sum = told[0];
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
  std::int32_t* places = first_places(p, &s);
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
  // All of it is there, used or not: the loads need not wait for each other.
  const RowHeader header = *arrival.header;
  Selection selection{};
  if (lane < top_k) selection = reinterpret_cast<const Selection*>(arrival.header + 1)[lane];
  std::int32_t note = LowLatencyRouting::kEnd;
  if (lane < top_k) {
    if (lane < header.count) {
      const std::int32_t in_expert =
          first_places(
              p, &s)[arrival.source * p.shape.placement.local_experts() + selection.local_expert] +
          selection.position;
      note = in_expert < room ? selection.local_expert * room + in_expert
                              : LowLatencyRouting::kDropped;
      if (note >= 0) p.source_tokens[note] = header.token;
    }
    const std::int64_t entry = (static_cast<std::int64_t>(arrival.source) *
                                    static_cast<std::int64_t>(slots.sizes.max_tokens) +
                                arrival.index) *
                                   top_k +
                               lane;
    p.routing.copies[entry] = note;
    p.routing.weights[entry] = lane < header.count ? selection.weight : 0.0F;
  }
  row.places[lane] = note;
  if (lane == 0) row.copies = header.count;
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

/// The workers' part. False if the wait was given up.
__device__ bool receive(const Params& p, Shared& s, Epoch n) {
  const Context& c = p.context;
  const LowLatencySlots& slots = p.shape.slots;
  if (!take_counts(p, s, n)) return false;
  mark(c, kCounted);
  const auto vectors = static_cast<int>(p.format.data_bytes / sizeof(uint4));
  bool good = true;
  int i = 0;
  const int rows = s.first_item[c.size];
  const Team team = Team::for_items(rows, static_cast<int>(gridDim.x));
#pragma unroll 1
  for (int base = 0, turn = 0; base < rows && good; base += team.count(), ++turn) {
    Expansion& row = s.rows[team.in_block][turn % 2];  // barriers as in send_batch
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
    const std::byte* data = reinterpret_cast<const std::byte*>(header) + slots.header_bytes;
    const auto* scales = reinterpret_cast<const float*>(data + p.format.data_bytes);
    HeldRow held;
    if (mine) {
      if (source == c.rank && !p.cast) {
        const std::int64_t token = header->token;
        data = p.x + token * p.format.data_bytes;
        scales = p.x_scales + token * p.format.scales;
      }
      held.load(data, vectors, team.thread, team.threads);
      if (team.first_warp()) find_places(p, s, row, {source, index, header});
    }
    team.sync();
    if (mine) expand_row(p, row, team, held, data, scales);
  }
  return good;
}

}  // namespace

// Kernel -----------------------------------------------------------------------------------------

namespace low_latency {

__global__ void __launch_bounds__(Block::kThreads, 1)
    dispatch(const __grid_constant__ LowLatencyDispatchParams p) {
  extern __shared__ __align__(16) std::byte memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Context& c = p.context;
  start(p);
  const auto lane = direction(c, p.shape.slots.dispatch);
  const bool sends = (p.halves & kSendHalf) != 0, receives = (p.halves & kReceiveHalf) != 0;
  bool good = true;
  const Entry entry = sends ? send(p, shared, lane, &good) : enter(c, lane);
  if (!good || !entry.usable) return;
  if (!receives) return leave_send(lane, entry.send);
  if (!Block::announcer()) good = receive(p, shared, entry.receive);
  if (!__syncthreads_and(good) || stops(c, Phase::release)) return;
  mark(c, kReceived);
  leave_receive(c, lane, p.shape.slots.dispatch, entry.receive, false, sends);
  mark(c, kEnded);
}

}  // namespace low_latency

// Launch -----------------------------------------------------------------------------------------

namespace {

std::size_t shared_bytes(int experts) {
  return sizeof(Shared) + 3 * static_cast<std::size_t>(experts) * sizeof(std::int32_t);
}

}  // namespace

cudaError_t launch(const LowLatencyDispatchParams& params, const Launch& launch) {
  low_latency::dispatch<<<launch.blocks, Block::kThreads,
                          shared_bytes(params.shape.placement.experts), launch.stream>>>(params);
  return cudaGetLastError();
}

cudaError_t prepare_low_latency_dispatch() {
  return cudaFuncSetAttribute(low_latency::dispatch, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(shared_bytes(kMostExperts)));
}

}  // namespace expertwire::ep::cuda
