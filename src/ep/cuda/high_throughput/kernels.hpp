#pragma once

// The kernels of the high-throughput mode, as the host launches them.

#include <cuda_runtime_api.h>

#include "ep/cuda/kernel/context.hpp"
#include "ep/cuda/kernel/tuning.hpp"
#include "ep/protocol/layout.hpp"
#include "ep/protocol/routing.hpp"
#include "ep/protocol/row_format.hpp"
#include "ep/protocol/slots.hpp"
#include "expertwire/dtype.hpp"

namespace expertwire::inline v0::ep::cuda {

/// Routing of one dispatch, in device memory; handles of cached dispatches share it.
struct HighThroughputRouting {
  Destination* destinations;  ///< [M, width] of this rank's tokens, ascending ranks, -1 ends
  std::int32_t* experts;      ///< [M, K] of this rank's tokens, -1 where there is none
  Epoch* epoch;               ///< [1] of the dispatch that made it
  std::int32_t* rows_to;      ///< [R] rows that this rank sends
  std::int32_t* rows_from;    ///< [R] rows that come
  std::int32_t* first_at;     ///< [R] this rank's first row at each rank
  std::int32_t* first_from;   ///< [R + 1] each source's first row here
  std::int32_t* capacity;     ///< [R] rows that each rank's output has room for
  std::int32_t* needed;       ///< [1] rows that came, or would have
  std::int32_t* overflow;     ///< [1] some rank's pool is too small: nothing is sent
  // Where rows are grouped by expert; else null. Those of this rank's output are its own.
  std::int32_t* positions;       ///< [M, K] of this rank's tokens: index among its of the expert
  std::int32_t* first_in;        ///< [R, L] first row of each source in each group
  std::int32_t* expert_offsets;  ///< [L + 1]
  std::int32_t* group_offsets;   ///< [L + 1] with what pads groups
  std::int32_t* places;          ///< [token rows, K] of what came, -1 where there is no row
};

/// What the host learns of the counts: int32 [kHeader + R + L] in pinned memory.
struct CountsMirror {
  static constexpr int kNeeded = 0, kOverflow = 1, kEpoch = 2, kHeader = 3;
  std::int32_t* values;   ///< header, rows per source, rows per expert
  std::uint32_t* ticket;  ///< released last
};

struct HighThroughputShape {
  HighThroughputSlots slots;
  Placement placement;
  std::int32_t top_k;
  std::int32_t width;  ///< most destinations of a token: min(K, R)
  DType dtype;
};

/// Blocks of notify that own tokens.
inline constexpr int kMostTallies = 32;

/// Counts, plans and tells all ranks; or, if `release` is set, only gives pool rows back.
struct NotifyParams {
  Context context;
  HighThroughputShape shape;
  HighThroughputRouting routing;
  Call call;
  std::int32_t tokens;
  Cut cut;                 ///< of the tokens, made at the launch: none for the first of many blocks
  std::int32_t capacity;   ///< rows that this rank's output has room for
  bool strict;             ///< no rank has given a capacity: needing more is an overflow
  std::int32_t alignment;  ///< of groups
  ExpertIds ids;
  CountsMirror mirror;  ///< values null: nobody waits
  std::uint32_t ticket;
  Tagged* tallies;       ///< [kMostTallies, R + E] what blocks of one grid tell each other
  const Epoch* release;  ///< epoch up to which pool rows are given back
};

/// Work that warps share out: tokens that are sent or summed, and from kRingTickets on the rows of
/// each ring.
enum Ticket : std::int32_t { kSendTicket, kSumTicket, kRingTickets };
inline constexpr int kTickets = kRingTickets + kMostRanks - 1;

struct FrameQueue;

struct HighThroughputDispatchParams {
  Context context;
  HighThroughputShape shape;
  HighThroughputRouting routing;
  Moving moving;
  Call call;  ///< told here if the routing is an earlier dispatch's; else notify has
  std::int32_t tokens;
  std::int32_t senders;  ///< warps of a block; the others receive
  bool pool;             ///< rows stay in the pool
  bool keep;             ///< no credit at the end: rows stay in the pool, or older ones do
  Epoch* epoch;          ///< of the handle: set to this dispatch's
  /// [R, chunks] pieces of a chunk of the pool written so far; zero between calls
  std::uint32_t* chunk_rows;
  std::uint32_t* tickets;  ///< [kTickets]; zero between calls
  FrameQueue* queue;       ///< frames that are written and not announced
  std::uint32_t queue_places;
  RowFormat format;           ///< of the rows
  const std::byte* x;         ///< [T, H]
  const float* x_scales;      ///< [T, scales] or null
  const float* topk_weights;  ///< [T, K] or null
  bool grouped;               ///< rows are grouped by expert, and what belongs to them is [N]
  bool places_known;          ///< an earlier dispatch has written the places of copies
  std::int32_t out_rows;      ///< N
  std::byte* out_x;           ///< [N, H]; null: rows stay in the pool, or are let through
  float* out_scales;          ///< [N, scales] or null
  std::int32_t* out_tokens;
  std::int32_t* out_experts;
  float* out_weights;
};

struct HighThroughputCombineParams {
  Context context;
  HighThroughputShape shape;
  HighThroughputRouting routing;
  Moving pushing, summing;
  Call call;
  std::int32_t tokens;
  std::int32_t pushers;  ///< warps of a block that push rows before they sum
  bool pull;             ///< y lies in the pool: peers read it there
  const Epoch* epoch;    ///< of the dispatch
  const Epoch* release;  ///< epoch up to which pool rows are given back at the end, or null
  std::uint32_t* tickets;
  FrameQueue* queue;
  std::uint32_t queue_places;
  bool grouped;               ///< rows are grouped by expert
  const std::byte* y;         ///< [N, H]
  const float* row_weights;   ///< grouped: [N] or null
  const float* topk_weights;  ///< [N, K], grouped [N], or null
  const std::byte* bias;      ///< [T, H] or null
  std::byte* out;             ///< [T, H]
  float* out_topk_weights;    ///< [T, K] or null
};

struct HighThroughputLaunch {
  int blocks;
  cudaStream_t stream;
};
/// `launch.blocks` is the most that it may take.
cudaError_t launch(const NotifyParams& params, const HighThroughputLaunch& launch);
cudaError_t launch(const HighThroughputDispatchParams& params, const HighThroughputLaunch& launch);
cudaError_t launch(const HighThroughputCombineParams& params, const HighThroughputLaunch& launch);

/// Load the kernels and let them have their shared memory; `bulk` if rings are used.
cudaError_t prepare_high_throughput_notify();
cudaError_t prepare_high_throughput_dispatch(bool bulk);
cudaError_t prepare_high_throughput_combine(bool bulk);

}  // namespace expertwire::ep::cuda
