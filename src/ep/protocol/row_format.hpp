#pragma once

// What a dispatched row is made of. Shared by host and device.

#include <cstdint>

#include "expertwire/dtype.hpp"
#include "expertwire/host_device.hpp"

namespace expertwire::inline v0::ep {

/// Channels of an fp8 row that share one scale.
inline constexpr int kScaleChannels = 128;

constexpr std::uint32_t scales_of(int hidden) {
  return static_cast<std::uint32_t>((hidden + kScaleChannels - 1) / kScaleChannels);
}

/// What the scales of a row are.
enum class Scale : std::uint8_t {
  none = 0,
  fp32 = 1,  ///< one for every kScaleChannels
};

/// The elements of a row as they travel and arrive, and its scales, which fp8 rows alone have.
struct RowFormat {
  DType dtype = DType::bf16;
  Scale scale = Scale::none;
  std::uint32_t data_bytes = 0;  ///< a multiple of 16
  std::uint32_t scales = 0;

  static constexpr RowFormat of(DType dtype, int hidden) {
    const bool scaled = dtype == DType::fp8_e4m3;
    return {dtype, scaled ? Scale::fp32 : Scale::none,
            static_cast<std::uint32_t>(static_cast<std::size_t>(hidden) * size_of(dtype)),
            scaled ? scales_of(hidden) : 0};
  }
  /// What ranks must agree on beside H, in 8 bits; and the dtype in it.
  constexpr std::int32_t word() const {
    return static_cast<std::int32_t>(dtype) | static_cast<std::int32_t>(scale) << 4;
  }
  static constexpr DType dtype_of(std::int32_t word) { return static_cast<DType>(word & 0xF); }
  /// Of the scales, where there are some.
  constexpr DType scale_dtype() const { return DType::fp32; }
  EXPERTWIRE_HOST_DEVICE constexpr std::uint32_t scale_bytes() const {
    return scales * static_cast<std::uint32_t>(sizeof(float));
  }
};

}  // namespace expertwire::ep
