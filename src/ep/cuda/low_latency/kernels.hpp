#pragma once

// The kernels of the low-latency mode, as the host launches them.

#include <cuda_runtime_api.h>

#include "ep/cuda/kernel/context.hpp"
#include "ep/cuda/kernel/tuning.hpp"
#include "ep/protocol/layout.hpp"
#include "ep/protocol/routing.hpp"
#include "ep/protocol/row_format.hpp"
#include "ep/protocol/slots.hpp"
#include "expertwire/dtype.hpp"

namespace expertwire::inline v0::ep::cuda {

/// Routing of one dispatch, in device memory that belongs to its handle. Rows that came are
/// addressed by [source][M], so that nothing needs a prefix sum.
struct LowLatencyRouting {
  Destination* destinations;  ///< [M, width] of this rank's tokens, ascending ranks, -1 ends
  std::int32_t* experts;      ///< [M, K] of this rank's tokens, -1 where there is none
  Epoch* epoch;               ///< [1] of the dispatch
  std::int32_t* rows_from;    ///< [R] rows that each source sent here
  std::int32_t* copies;       ///< [R, M, K] places of a row in the output, or one of the marks
  float* weights;             ///< [R, M, K] that came with dispatch
  static constexpr std::int32_t kEnd = -1, kDropped = -2;
};

/// What both operations are told of the object.
struct LowLatencyShape {
  LowLatencySlots slots;
  Placement placement;
  std::int32_t top_k;
  std::int32_t width;  ///< most destinations of a token: min(K, R)
  std::int32_t turn;   ///< this rank's number modulo the width
  Divider by_top_k, by_width;
  DType dtype;
  std::uint32_t shared_bytes;  ///< shared memory that a block may have
  bool bulk;                   ///< there is a copy engine, and it may be used
};

/// What both operations are told of a call.
struct LowLatencyParams {
  Context context;
  LowLatencyShape shape;
  LowLatencyRouting routing;
  Call call;
  std::int32_t tokens;
  std::int32_t halves;
};

struct LowLatencyDispatchParams : LowLatencyParams {
  // Made at the launch.
  Cut cut;  ///< of the tokens: none for the first block where they are few
  Images images;
  bool keeps_own;  ///< own rows are expanded from their images: both halves, an image a token
  // Given.
  RowFormat format;                 ///< of the rows that travel and of out_x
  bool cast;                        ///< x is of the row type and is cast to that format
  ExpertIds ids;                    ///< [T, K]
  const std::byte* x;               ///< [T, H]
  const float* x_scales;            ///< [T, scales] or null
  const float* topk_weights;        ///< [T, K] or null
  std::byte* out_x;                 ///< [L, R*M, H]
  std::int32_t* tokens_per_expert;  ///< [L]
  SourceRange* ranges;              ///< [L, R]
  std::int32_t* source_tokens;      ///< [L, R*M]
  float* out_scales;                ///< [L, R*M, scales] or null
};

struct LowLatencyCombineParams : LowLatencyParams {
  const std::byte* y;         ///< [L, R*M, H]
  const float* topk_weights;  ///< [T, K], if dispatch had none; or null
  const std::byte* bias;      ///< [T, H] or null
  std::byte* out;             ///< [T, H]
};

struct Launch {
  int blocks;
  cudaStream_t stream;
};

cudaError_t launch(const LowLatencyDispatchParams& params, const Launch& launch);
cudaError_t launch(const LowLatencyCombineParams& params, const Launch& launch);

/// Shared memory that a block of dispatch needs at least.
std::uint32_t fewest_shared_bytes(const LowLatencyShape& shape);

/// Loads the kernels and lets them have the shared memory of a block; once a device.
cudaError_t prepare_low_latency(std::uint32_t shared_bytes);

}  // namespace expertwire::ep::cuda
