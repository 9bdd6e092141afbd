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

/// The elements of a row as they travel and arrive, and its fp32 scales, which fp8 rows alone have.
struct RowFormat {
  DType dtype = DType::bf16;
  std::uint32_t data_bytes = 0;  ///< a multiple of 16
  std::uint32_t scales = 0;

  static constexpr RowFormat of(DType dtype, int hidden) {
    return {dtype, static_cast<std::uint32_t>(static_cast<std::size_t>(hidden) * size_of(dtype)),
            dtype == DType::fp8_e4m3 ? scales_of(hidden) : 0};
  }
  EXPERTWIRE_HOST_DEVICE constexpr std::uint32_t scale_bytes() const {
    return scales * static_cast<std::uint32_t>(sizeof(float));
  }
};

}  // namespace expertwire::ep
