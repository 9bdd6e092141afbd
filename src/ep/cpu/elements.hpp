#pragma once

// The element types that sums and casts work on. The CUDA backend has the same names in
// ep/cuda/kernel/vectors.cuh. Included by one source file for each instruction set, in an unnamed
// namespace.

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "expertwire/dtype.hpp"

namespace expertwire::inline v0::ep::cpu {
namespace {

/// `Bits` is how an element is kept; value() gives it in fp32, exactly; round() goes back to the
/// nearest, of two as near the even one. What is no number becomes the same code on both backends.
struct Bf16 {
  using Bits = std::uint16_t;
  static float value(Bits bits) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  }
  static Bits round(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t rounded = bits + 0x7FFF + ((bits >> 16) & 1);
    return static_cast<Bits>(std::isnan(value) ? 0x7FFF : rounded >> 16);
  }
};

struct Fp16 {
  using Bits = std::uint16_t;
  static float value(Bits bits) {
    const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000U) << 16;
    const std::uint32_t size = bits & 0x7FFFU;
    // Below 2^-14 numbers are multiples of 2^-24; above, the exponent is counted from 15.
    constexpr std::uint32_t kSmallest = 0x400, kInfinity = 0x7C00;
    if (size < kSmallest)
      return std::bit_cast<float>(
          sign | std::bit_cast<std::uint32_t>(static_cast<float>(size) * 0x1p-24F));
    const std::uint32_t wide = size << 13;
    return std::bit_cast<float>(
        sign | (size >= kInfinity ? wide | 0x7F800000U : wide + ((127U - 15U) << 23)));
  }
  static Bits round(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t sign = bits >> 16 & 0x8000U, size = bits & 0x7FFFFFFFU;
    constexpr std::uint32_t kInfinity = 0x7F800000, kTooLarge = 0x47800000, kSmallest = 0x38800000;
    if (size > kInfinity) return 0x7FFF;
    if (size >= kTooLarge) return static_cast<Bits>(sign | 0x7C00U);
    if (size < kSmallest) {  // adding 2^-1 rounds to multiples of 2^-24
      const float sum = std::bit_cast<float>(size) + 0.5F;
      return static_cast<Bits>(sign | (std::bit_cast<std::uint32_t>(sum) - 0x3F000000U));
    }
    const std::uint32_t rounded = size - ((127U - 15U) << 23) + 0xFFFU + ((size >> 13) & 1U);
    return static_cast<Bits>(sign | (rounded >> 13));
  }
};

struct Fp32 {
  using Bits = float;
  static float value(Bits bits) { return bits; }
  static Bits round(float value) { return value; }
};

/// The only switch on a dtype of this backend: calls `visit` with its element.
template <class Visit>
void with_element(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::bf16:
      return visit(Bf16{});
    case DType::fp16:
      return visit(Fp16{});
    default:
      return visit(Fp32{});
  }
}

}  // namespace
}  // namespace expertwire::ep::cpu
