#pragma once

#include <cstddef>
#include <cstdint>

#include "expertwire/dtype.hpp"

namespace expertwire::inline v0 {

/// The shape of one MoE layer's communication, or the most that calls of an object bring; the same
/// on every rank.
struct MoeShape {
  int hidden = 0;  ///< H, 1 to 2^20; a row of `hidden` elements is a multiple of 16 bytes
  /// E over all ranks, 1 to 2^20; a multiple of the number of ranks; CUDA: at most 8192
  int experts = 0;
  int top_k = 0;  ///< K, 1 to 32
  /// M, the most tokens any rank may dispatch at once, 1 to 2^24; R*M below 2^31. High throughput
  /// without a pool takes 0: no bound but these
  int max_tokens = 0;
  DType dtype = DType::bf16;  ///< of a row: bf16, fp16 or fp32

  std::size_t row_bytes() const noexcept {
    return static_cast<std::size_t>(hidden) * size_of(dtype);
  }
};

}  // namespace expertwire
