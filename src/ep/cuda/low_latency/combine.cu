// Low-latency combine: each rank sums what its experts made of a token and sends one partial sum
// home, where at most min(K, R) of them are added.
//
// Roles. The first block ships the weights if dispatch did not have them. A team sums one row that
// came from another rank and writes the partial sum into that rank's slot. Then the whole block
// adds the partial sums of one token after another; the own rank's share is made there, without a
// slot, while the others are on the wire. The first of the senders, warps apart, releases the flags
// of what teams wrote last; another, of the first block, tells what this call is about and
// compares; the others have nothing to do here.
//
// Who writes what. Slot regions [slot][expert rank] of a rank are written by that expert rank
// alone, a row by one team; an output token by one block.
//
// Memory order. Stores of the team, barrier, release of the row's flag by one thread; acquire by
// one thread, barrier, loads. Weights have one flag a source, and are written, as rows are, after
// credit.
//
// Cost. Reads T * K rows of y in all, sends T * (distinct ranks) rows, reads them once. What can be
// known before the epoch (rows of each source, credit) is asked for together with it.

#include "ep/cuda/kernel/call.cuh"
#include "ep/cuda/kernel/courier.cuh"
#include "ep/cuda/kernel/team.cuh"
#include "ep/cuda/kernel/vectors.cuh"
#include "ep/cuda/low_latency/kernels.hpp"

namespace expertwire::inline v0::ep::cuda {

namespace {

// Params -----------------------------------------------------------------------------------------

using Params = LowLatencyCombineParams;

/// The expert outputs of a row, in top-k order.
struct ExpertRows {
  const std::byte* rows[kMostTopK];
  float weights[kMostTopK];
  int count;
};

/// The partial sums of a token, ascending ranks; null: the own rank's.
struct Parts {
  const std::byte* rows[kMostTopK];
  int count;
  bool good;
};

struct Shared {
  ExpertRows teams[Team::kMostPerBlock];
  ExpertRows own;
  Parts parts;
  bool weighted;                           // weights come with this combine
  std::int32_t first_row[kMostRanks + 1];  // of each source, in the order of items
};

// Roles: caller ----------------------------------------------------------------------------------

/// The sender that tells other ranks what this call is about, and compares.
constexpr int kCaller = 1;
static_assert(kCaller < Block::kSenders);

__device__ __forceinline__ bool is_caller() {
  return blockIdx.x == 0 && Block::sends() && Block::sender() == kCaller;
}

__device__ __forceinline__ Saying saying(const Params& p, Epoch n, Epoch about) {
  return {p.context, p.shape.slots.combine, n, p.call, about};
}
__device__ __forceinline__ Saying saying(const Params& p, Epoch n) {
  return saying(p, n, *p.routing.epoch);
}

/// A set of ranks, a part of it on each lane.
struct Ranks {
  std::uint32_t words[kMostRanks / 32] = {};

  __device__ void add(int rank) {
#pragma unroll
    for (int i = 0; i < kMostRanks / 32; ++i)
      if (rank / 32 == i) words[i] |= 1U << (rank % 32);
  }
  __device__ bool has(int rank) const {
    bool found = false;
#pragma unroll
    for (int i = 0; i < kMostRanks / 32; ++i)
      found = found || (rank / 32 == i && (words[i] >> (rank % 32) & 1U) != 0);
    return found;
  }
};

/// Compares the calls of those that partial sums come from; the caller.
__device__ __noinline__ bool compare(const Params& p, Epoch n) {
  Ranks from;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x) % 32; i < p.tokens * p.shape.width; i += 32)
    if (const int rank = p.routing.destinations[i].rank; rank >= 0) from.add(rank);
#pragma unroll
  for (std::uint32_t& word : from.words) word = __reduce_or_sync(kAllLanes, word);
  return compare_calls(saying(p, n), [&](int source) { return from.has(source); });
}

// Roles: weights ---------------------------------------------------------------------------------

/// Ships the weights of this rank's tokens to the ranks that sum for them; the first block.
__device__ void send_weights(const Params& p, Epoch n) {
  const Context& c = p.context;
  const int width = p.shape.width, top_k = p.shape.top_k;
#pragma unroll 1
  for (int i = threadIdx.x; i < p.tokens * width; i += blockDim.x) {
    const Destination to = p.routing.destinations[i];
    if (to.rank < 0) continue;
    const std::int64_t first = static_cast<std::int64_t>(p.shape.by_width.quotient(i)) * top_k;
    float* weights = outbox<float>(c, to.rank, p.shape.slots.weights_of(n, to.row));
#pragma unroll 1
    for (int k = 0; k < top_k; ++k) {
      const std::int32_t expert = p.routing.experts[first + k];
      if (expert >= 0 && p.shape.placement.rank_of(expert) == to.rank)
        *weights++ = p.topk_weights[first + k];
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int peer = threadIdx.x; peer < c.size; peer += blockDim.x)
    announce(c, peer, p.shape.slots.combine.flag_of(n), n);
}

/// Whether ranks send weights with this combine. One without tokens has none to give: it asks one
/// that it sums for. All threads; false if that did not tell. As all that is rare here, it is not
/// inlined: its registers are wanted elsewhere.
__device__ __noinline__ bool learn_weights(const Params& p, Shared& s, Epoch n) {
  const Context& c = p.context;
  bool good = true;
  if (threadIdx.x == 0) {
    int source = 0;
    while (source < c.size && p.routing.rows_from[source] == 0) ++source;
    std::int32_t options = 0;
    if (source < c.size)
      good = await_told<1>(
          c, n, [&](int) { return saying(p, n).heard_from(source, n) + Call::kKind; },
          [&](int) { return source; }, &options);
    s.weighted = (options & Call::kWeights) != 0;
  }
  return __syncthreads_and(good);
}

/// Compares the call of one that sends no weights.
__device__ __noinline__ bool compare_one(const Params& p, Epoch n, int source) {
  return compare_call(saying(p, n), source);
}

/// Waits for the weights of a source, unless its call says that it sends none; a thread a source.
__device__ bool await_weights_of(const Params& p, Epoch n, int source) {
  const Context& c = p.context;
  const auto* flag = inbox<Epoch>(c, source, p.shape.slots.combine.flag_of(n));
  const Tagged* options = saying(p, n, 0).heard_from(source, n) + Call::kKind;
  bool none = false;
  const bool good = wait_until(c, source, Phase::combine_weights, n, [&] {
    if (arrived<KernelAccess>(flag, n)) return true;
    const Tagged told = KernelAccess::load(options);
    none = belongs_to(told, n) && (told.value & Call::kWeights) == 0;
    return none;
  });
  return good && (!none || compare_one(p, n, source));
}

__device__ bool await_weights(const Params& p, Epoch n) {
  bool good = true;
#pragma unroll 1
  for (int source = threadIdx.x; source < p.context.size && good; source += blockDim.x)
    good = p.routing.rows_from[source] == 0 || await_weights_of(p, n, source);
  return __syncthreads_and(good);
}

// Roles: partial sums ----------------------------------------------------------------------------

/// Counts the rows of each source, in the order in which this rank sums them: its own come last,
/// and ranks do not all begin with the same one. One warp.
__device__ void take_rows(const Params& p, Shared& s) {
  const Context& c = p.context;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  std::int32_t before = 0;
#pragma unroll 1
  for (int base = 1; base < c.size; base += 32) {
    const int i = base + lane;
    const std::int32_t rows = i < c.size ? p.routing.rows_from[source_at(c, i)] : 0;
    const std::int32_t sum = sum_up_to(rows, lane);
    if (i < c.size) s.first_row[i + 1] = before + sum;
    before += __shfl_sync(kAllLanes, sum, 31);
  }
  if (lane == 0) s.first_row[1] = 0;
}

/// Finds the expert outputs of a row; one warp.
__device__ void find_rows(const Params& p, const Shared& s, ExpertRows& found, int source, int row,
                          Epoch n) {
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
    weight = s.weighted ? rows_from<float>(p.context, source, slots.weights_of(n, row))[lane]
                        : p.routing.weights[entry + lane];
  }
  const unsigned present = __ballot_sync(kAllLanes, place >= 0);  // dropped ones are left out
  if (place >= 0) {
    const int i = __popc(present & ((1U << lane) - 1));
    found.rows[i] = p.y + static_cast<std::uint64_t>(place) * slots.sizes.row_bytes;
    found.weights[i] = weight;
  }
  if (lane == 0) found.count = __popc(present);
}

/// Sums the vectors `v`, `v` + stride, ... below `vectors` of all rows: kVectors of them, kRows
/// rows at a time in flight.
template <class Element, int kRows, int kVectors>
__device__ __forceinline__ void add_rows(const ExpertRows& found, int v, int stride, int vectors,
                                         float (*acc)[Element::kLanes]) {
  for (int first = 0; first < found.count; first += kRows) {
    uint4 held[kRows][kVectors];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        if (first + r < found.count && v + i * stride < vectors)
          held[r][i] = reinterpret_cast<const uint4*>(found.rows[first + r])[v + i * stride];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        if (first + r < found.count && v + i * stride < vectors)
          Element::add(found.weights[first + r], held[r][i], acc[i]);
  }
}

template <class Element, int kRows, int kVectors>
__device__ void sum_partial(const Params& p, const Team& team, const ExpertRows& found,
                            std::byte* out) {
  const auto vectors = static_cast<int>(p.shape.slots.sizes.row_bytes / sizeof(uint4));
  for (int v = team.thread; v < vectors; v += kVectors * team.threads) {
    float acc[kVectors][Element::kLanes] = {};
    add_rows<Element, kRows, kVectors>(found, v, team.threads, vectors, acc);
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      if (v + i * team.threads < vectors)
        reinterpret_cast<uint4*>(out)[v + i * team.threads] = Element::round(acc[i]);
  }
}

/// The rows of other ranks, as the teams of all blocks take them.
struct Rows {
  const Params& p;
  const Shared& s;
  Epoch n;
  int count;

  __device__ Rows(const Params& params, const Shared& shared, Epoch epoch)
      : p(params), s(shared), n(epoch), count(shared.first_row[params.context.size]) {}
  /// The source of an item and its row among those; `i` is the place of an earlier item's source.
  __device__ Destination at_item(int item, int& i) const {
    while (item >= s.first_row[i + 1]) ++i;
    return {source_at(p.context, i), item - s.first_row[i]};
  }
  __device__ void announce(const Destination& row) const {
    const Context& c = p.context;
    cuda::announce(c, row.rank, p.shape.slots.partial_flag_of(n, row.row), n);
  }
};

/// Sums rows and sends them home, a team a row. The last round is the sender's to release.
template <class Element>
__device__ void send_rows(const Rows& rows, Shared& s, const Team& team) {
  const Params& p = rows.p;
  const Context& c = p.context;
  ExpertRows& found = s.teams[team.in_block];
  int i = 1;
#pragma unroll 1
  for (int base = 0; base < rows.count; base += team.count()) {  // teams meet at the same barriers
    const int item = base + team.index();
    const bool mine = item < rows.count;
    Destination row{-1, -1};
    if (mine) row = rows.at_item(item, i);
    if (mine && team.first_warp()) find_rows(p, s, found, row.rank, row.row, rows.n);
    team.sync();
    if (mine) {
      auto* out = outbox<std::byte>(c, row.rank, p.shape.slots.partial_of(rows.n, row.row));
      if (team.per_block == 1)
        sum_partial<Element, 4, 2>(p, team, found, out);
      else
        sum_partial<Element, 2, 2>(p, team, found, out);
    }
    if (base + team.count() >= rows.count) return Block::hand_over();
    team.sync();
    if (mine && team.thread == 0) rows.announce(row);
  }
}

/// The senders' part: the last round of this block's teams, a lane a team.
__device__ void announce_rows(const Rows& rows, const Team& team) {
  if (rows.count == 0) return;
  const int lane = static_cast<int>(threadIdx.x) - Block::kWorkers;
  const int item = (rows.count - 1) / team.count() * team.count() + team.index_of(lane);
  Block::await_workers();
  int i = 1;
  if (lane < team.per_block && item < rows.count) rows.announce(rows.at_item(item, i));
}

/// What comes before the rows of a block: credit, what this call is about, weights. Its first
/// barrier is also that of credit. Inlined: parameters that are reached through an address cost
/// 0.7 us.
__device__ __forceinline__ Entry open(const Params& p, Shared& s,
                                      const Direction<KernelAccess>& lane) {
  const Context& c = p.context;
  const Peeked peeked = peek(c, lane);
  const Epoch about = is_caller() ? *p.routing.epoch : 0;
  if (threadIdx.x / 32 == Block::kWorkers / 32 - 1) take_rows(p, s);  // the first have credit
  if (stops(c, Phase::combine_weights) || stops(c, Phase::credit)) return {};
  Entry entry = admit(c, lane, peeked);
  const Epoch n = entry.send;
  if (!entry.usable) return entry;
  if (is_caller()) tell_call(saying(p, n, about), static_cast<int>(threadIdx.x) % 32, 32);
  // Not before credit: receive halves two epochs back may still wait for the flag of theirs.
  if (p.topk_weights != nullptr && blockIdx.x == 0) send_weights(p, n);
  if (p.tokens == 0) entry.usable = learn_weights(p, s, n);
  if (entry.usable && s.weighted) entry.usable = await_weights(p, n);
  entry.usable = entry.usable && !stops(c, Phase::combine_rows);
  mark(c, kAdmitted);
  return entry;
}

/// The rows of one block.
template <class Element>
__device__ __forceinline__ Entry send(const Params& p, Shared& s,
                                      const Direction<KernelAccess>& lane) {
  const Entry entry = open(p, s, lane);
  if (!entry.usable) return entry;
  const Rows rows(p, s, entry.send);
  const Team team = Team::for_items(rows.count, workers(p.context));
  if (Block::sends())
    announce_rows(rows, team);
  else
    send_rows<Element>(rows, s, team);
  mark(p.context, kSent, Block::kWorkers);
  return entry;
}

// Roles: tokens ----------------------------------------------------------------------------------

/// Finds the partial sums of a token and its own rank's expert outputs; waits for nothing. One
/// warp; lane i returns the i-th rank of the token.
__device__ Destination find_parts(const Params& p, Shared& s, int token, Epoch n) {
  const Context& c = p.context;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Destination from{-1, -1};
  if (lane < p.shape.width)
    from = p.routing.destinations[static_cast<std::int64_t>(token) * p.shape.width + lane];
  const bool other = from.rank >= 0 && from.rank != c.rank;
  s.parts.rows[lane] =
      other ? rows_from<std::byte>(c, from.rank, p.shape.slots.partial_of(n, from.row)) : nullptr;
  const unsigned all = __ballot_sync(kAllLanes, from.rank >= 0);
  const unsigned own = __ballot_sync(kAllLanes, from.rank == c.rank);
  if (lane == 0) {
    s.parts.count = __popc(all);
    s.own.count = 0;
  }
  __syncwarp();
  if (own != 0)
    find_rows(p, s, s.own, c.rank,
              __shfl_sync(kAllLanes, from.row, __ffs(static_cast<int>(own)) - 1), n);
  return from;
}

/// Waits for the partial sum of a lane's rank; one warp.
__device__ bool await_part(const Params& p, const Destination& from, Epoch n) {
  const Context& c = p.context;
  if (from.rank < 0 || from.rank == c.rank) return true;
  const auto* flag = inbox<Epoch>(c, from.rank, p.shape.slots.partial_flag_of(n, from.row));
  return wait_until(c, from.rank, Phase::combine_rows, static_cast<std::uint64_t>(from.row),
                    [&] { return arrived<KernelAccess>(flag, n); });
}

/// Vectors of a token that a thread sums at a time.
constexpr int kTokenVectors = 2;

/// The own rank's share of vectors `v`, `v` + stride, ..., rounded as if it had come over the wire.
template <class Element>
__device__ __forceinline__ void own_parts(const ExpertRows& found, int v, int stride, int vectors,
                                          uint4* own) {
  float acc[kTokenVectors][Element::kLanes] = {};
  add_rows<Element, 4, kTokenVectors>(found, v, stride, vectors, acc);
#pragma unroll
  for (int i = 0; i < kTokenVectors; ++i) own[i] = Element::round(acc[i]);
}

/// Sums vectors of a token over its ranks and writes them. Parts are loaded kInFlight at a time.
template <class Element>
__device__ __forceinline__ void sum_parts(const Parts& parts, const uint4* bias, const uint4* own,
                                          int v, int stride, int vectors, uint4* out) {
  float acc[kTokenVectors][Element::kLanes] = {};
#pragma unroll
  for (int i = 0; i < kTokenVectors; ++i)
    if (bias != nullptr && v + i * stride < vectors)
      Element::add(1.0F, bias[v + i * stride], acc[i]);
  for (int first = 0; first < parts.count; first += kInFlight) {
    uint4 held[kInFlight][kTokenVectors];
#pragma unroll
    for (int r = 0; r < kInFlight; ++r)
#pragma unroll
      for (int i = 0; i < kTokenVectors; ++i) {
        held[r][i] = own[i];
        if (first + r < parts.count && parts.rows[first + r] != nullptr && v + i * stride < vectors)
          held[r][i] = reinterpret_cast<const uint4*>(parts.rows[first + r])[v + i * stride];
      }
#pragma unroll
    for (int r = 0; r < kInFlight; ++r)
#pragma unroll
      for (int i = 0; i < kTokenVectors; ++i)
        if (first + r < parts.count) Element::add(1.0F, held[r][i], acc[i]);
  }
#pragma unroll
  for (int i = 0; i < kTokenVectors; ++i)
    if (v + i * stride < vectors) out[v + i * stride] = Element::round(acc[i]);
}

/// Sums one token; all workers. The own share of a thread's first vectors is made while the first
/// warp waits for the others.
template <class Element>
__device__ bool sum_token(const Params& p, Shared& s, int token, Epoch n) {
  const std::uint64_t row_bytes = p.shape.slots.sizes.row_bytes;
  const std::uint64_t offset = static_cast<std::uint64_t>(token) * row_bytes;
  const auto* bias = p.bias != nullptr ? reinterpret_cast<const uint4*>(p.bias + offset) : nullptr;
  auto* out = reinterpret_cast<uint4*>(p.out + offset);
  const auto vectors = static_cast<int>(row_bytes / sizeof(uint4));
  constexpr int kStride = Block::kWorkers;
  Destination from{-1, -1};
  if (threadIdx.x < 32) from = find_parts(p, s, token, n);
  Block::sync_workers();
  int v = static_cast<int>(threadIdx.x);
  uint4 own[kTokenVectors];
  own_parts<Element>(s.own, v, kStride, vectors, own);
  if (threadIdx.x < 32) {
    const bool good = __all_sync(kAllLanes, await_part(p, from, n));
    if (threadIdx.x == 0) s.parts.good = good;
  }
  __syncwarp();
  Block::sync_workers();
  if (!s.parts.good) return false;
  while (v < vectors) {
    sum_parts<Element>(s.parts, bias, own, v, kStride, vectors, out);
    v += kTokenVectors * kStride;
    if (v < vectors) own_parts<Element>(s.own, v, kStride, vectors, own);
  }
  Block::sync_workers();
  return true;
}

template <class Element>
__device__ void run(const Params& p, Shared& s) {
  const Context& c = p.context;
  start(p);
  if (threadIdx.x == 0) s.weighted = p.topk_weights != nullptr;  // seen behind the first barrier
  const auto lane = direction(c, p.shape.slots.combine);
  const bool sends = (p.halves & kSendHalf) != 0, receives = (p.halves & kReceiveHalf) != 0;
  if (is_courier(c)) return carry_halves(c, lane, p.shape.slots.combine, p.halves);
  const Entry entry = sends ? send<Element>(p, s, lane) : enter(c, lane);
  if (!entry.usable) return;
  if (!receives) return leave_send(lane, entry.send);
  const Epoch n = entry.receive;
  // Split from its send half, it has not seen the weights of the own rank's rows yet.
  if (!sends && p.topk_weights != nullptr && !await_weights(p, n)) return;
  bool good = !is_caller() || compare(p, n);
  if (!Block::sends())
#pragma unroll 1
    for (int token = blockIdx.x; token < p.tokens && good; token += workers(c))
      good = sum_token<Element>(p, s, token, n);
  if (!__syncthreads_and(good) || stops(c, Phase::release)) return;
  mark(c, kReceived);
  leave_receive(c, lane, p.shape.slots.combine, n, false, sends);
  mark(c, kEnded);
}

}  // namespace

// Kernel -----------------------------------------------------------------------------------------

namespace low_latency {

template <class Element>
__global__ void __launch_bounds__(Block::kThreads, 1)
    combine(const __grid_constant__ LowLatencyCombineParams p) {
  __shared__ Shared shared;
  run<Element>(p, shared);
}

}  // namespace low_latency

// Launch -----------------------------------------------------------------------------------------

cudaError_t launch(const LowLatencyCombineParams& params, const Launch& launch) {
  return with_element(params.shape.dtype, [&](auto element) {
    low_latency::combine<decltype(element)>
        <<<launch.blocks + params.context.couriers, Block::kThreads, 0, launch.stream>>>(params);
    return cudaGetLastError();
  });
}

cudaError_t prepare_low_latency_dispatch(std::uint32_t shared_bytes);

cudaError_t prepare_low_latency(std::uint32_t shared_bytes) {
  const cudaError_t result = for_each_element([](auto element) {
    cudaFuncAttributes attributes{};
    return cudaFuncGetAttributes(&attributes, low_latency::combine<decltype(element)>);
  });
  return result != cudaSuccess ? result : prepare_low_latency_dispatch(shared_bytes);
}

}  // namespace expertwire::ep::cuda
