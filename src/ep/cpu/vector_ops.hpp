#pragma once

#include <cstddef>
#include <cstdint>

#include "expertwire/dtype.hpp"

namespace expertwire::inline v0::ep::cpu {

/// out = round(init + w[0]*rows[0] + w[1]*rows[1] + ...), element by element: the running sum is
/// fp32, every step one fma, in the order given; the end is rounded to nearest even.
struct SumRequest {
  DType dtype = DType::bf16;          ///< of rows, init and out
  std::size_t elements = 0;           ///< a multiple of 16 bytes
  const void* const* rows = nullptr;  ///< [count]
  const float* weights = nullptr;     ///< [count], or null for a plain sum
  int count = 0;
  const void* init = nullptr;  ///< or null for 0
  void* out = nullptr;
  bool stream = false;  ///< write past the caches
};

/// A row cast to fp8-e4m3: for every 128 channels a = max(|x|, 1e-4), scale = a / 448, and value =
/// x * (448 / a) rounded to nearest even; what is no number, or becomes none, is 0x7F.
struct CastRequest {
  DType dtype = DType::bf16;  ///< of x
  std::size_t elements = 0;   ///< a multiple of 16
  const void* x = nullptr;
  void* out = nullptr;      ///< [elements]
  float* scales = nullptr;  ///< [ceil(elements / 128)]
};

/// The loops that touch row data, in one version an instruction set.
struct VectorOps {
  const char* name;
  /// Copies `bytes` (a multiple of 16) to `count` places. With `stream` the stores pass the caches;
  /// they are ordered before later release stores by store_fence().
  void (*copy)(void* const* to, int count, const void* from, std::size_t bytes, bool stream);
  void (*sum)(const SumRequest& request);
  void (*cast)(const CastRequest& request);
  /// Orders earlier streaming stores before later stores.
  void (*store_fence)();
};

/// The version that fits this machine.
const VectorOps& vector_ops();

/// Each version, for tests; null where this machine or build lacks it.
const VectorOps* generic_ops();
const VectorOps* avx2_ops();
const VectorOps* avx512_ops();

}  // namespace expertwire::ep::cpu
