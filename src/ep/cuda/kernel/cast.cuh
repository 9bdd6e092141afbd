#pragma once

// Rows cast to fp8-e4m3 on their way: per 128 channels a = max(|x|, 1e-4), scale = a / 448, value =
// x * (448 / a), rounded to nearest even. The CPU backend does the same arithmetic.

#include "device/fp8.cuh"
#include "ep/cuda/kernel/vectors.cuh"
#include "ep/protocol/row_format.hpp"

namespace expertwire::inline v0::ep::cuda {

/// Channels that a thread casts at a time, so that it writes one vector; 8 lanes share a scale.
inline constexpr int kCastChannels = 16;
inline constexpr int kLanesOfScale = kScaleChannels / kCastChannels;

/// Casts a row of `hidden` channels, a multiple of kCastChannels; all threads of a team call.
/// `write(chunk, codes)` gets 16 codes for the chunk-th vector of the row, `write_scale(i, scale)`
/// the i-th scale.
template <class Element, class Write, class WriteScale>
__device__ __forceinline__ void cast_row(const std::byte* row, int hidden, int thread, int threads,
                                         Write write, WriteScale write_scale) {
  constexpr int kVectors = kCastChannels / Element::kLanes;
  const int chunks = hidden / kCastChannels;
#pragma unroll 1
  for (int base = 0; base < chunks; base += threads) {  // alike on all lanes, for the shuffles
    const int chunk = base + thread;
    float x[kCastChannels] = {};
    if (chunk < chunks) {
      uint4 vectors[kVectors];
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        vectors[i] = reinterpret_cast<const uint4*>(row)[chunk * kVectors + i];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) Element::values(vectors[i], x + i * Element::kLanes);
    }
    float most = 1e-4F;
#pragma unroll
    for (float value : x) most = fmaxf(most, fabsf(value));
#pragma unroll
    for (int step = 1; step < kLanesOfScale; step *= 2)
      most = fmaxf(most, __shfl_xor_sync(device::kAllLanes, most, step));
    if (chunk >= chunks) continue;
    const float inverse = __fdiv_rn(device::kLargestE4m3, most);
    std::uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      words[i] =
          device::to_e4m3x2(__fmul_rn(x[4 * i], inverse), __fmul_rn(x[4 * i + 1], inverse)) |
          device::to_e4m3x2(__fmul_rn(x[4 * i + 2], inverse), __fmul_rn(x[4 * i + 3], inverse))
              << 16;
    write(chunk, uint4{words[0], words[1], words[2], words[3]});
    if (chunk % kLanesOfScale == 0)
      write_scale(chunk / kLanesOfScale, __fdiv_rn(most, device::kLargestE4m3));
  }
}

}  // namespace expertwire::ep::cuda
