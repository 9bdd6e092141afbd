#pragma once

// fp8-e4m3: 4 bits of exponent, 3 of mantissa, no infinity, largest number 448.

#include <cstdint>

#include "device/ptx.cuh"

namespace expertwire::inline v0::device {

inline constexpr float kLargestE4m3 = 448;

/// Round to nearest even, saturating; by integer arithmetic, for devices without the instruction.
__device__ __forceinline__ std::uint32_t to_e4m3_by_bits(float value) {
  constexpr std::uint32_t kLargest = 0x7E, kNan = 0x7F;
  const std::uint32_t bits = __float_as_uint(value), size = bits & 0x7FFFFFFFU;
  if (size > 0x7F800000U) return kNan;
  std::uint32_t code = 0;
  if (size < 0x3C800000U) {  // multiples of 2^-9, to which adding 2^14 rounds
    constexpr float kMagic = 16384;
    code = __float_as_uint(__fadd_rn(__uint_as_float(size), kMagic)) - __float_as_uint(kMagic);
  } else {  // 3 bits behind the leading one
    code = min(((size + 0x7FFFFU + ((size >> 20) & 1U)) >> 20) - ((127U - 7U) << 3), kLargest);
  }
  return code | (bits >> 24 & 0x80U);
}

/// Two values as two codes, the first in the low byte.
__device__ __forceinline__ std::uint32_t to_e4m3x2(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  return convert_e4m3x2(low, high);
#else
  return to_e4m3_by_bits(low) | to_e4m3_by_bits(high) << 8;
#endif
}

}  // namespace expertwire::device
