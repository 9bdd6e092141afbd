#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace expertwire::inline v0 {

/// Element types of tensors. Rows travel as bytes; only combine, and a dispatch that casts, look at
/// the elements.
enum class DType : std::uint8_t {
  bf16 = 0,
  fp16 = 1,
  fp32 = 2,
  fp8_e4m3 = 3,
  int32 = 4,
  int64 = 5,
  uint8 = 6,
};

/// Bytes of one element.
constexpr std::size_t size_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::bf16:
    case DType::fp16:
      return 2;
    case DType::fp32:
    case DType::int32:
      return 4;
    case DType::int64:
      return 8;
    case DType::fp8_e4m3:
    case DType::uint8:
      return 1;
  }
  return 0;
}

constexpr std::string_view to_string(DType dtype) noexcept {
  switch (dtype) {
    case DType::bf16:
      return "bf16";
    case DType::fp16:
      return "fp16";
    case DType::fp32:
      return "fp32";
    case DType::fp8_e4m3:
      return "fp8_e4m3";
    case DType::int32:
      return "int32";
    case DType::int64:
      return "int64";
    case DType::uint8:
      return "uint8";
  }
  return "?";
}

}  // namespace expertwire
