#pragma once

#include <cstdint>

#include "expertwire/host_device.hpp"

namespace expertwire::inline v0::ep {

/// Divides by a number that is known beforehand. Kernels do it by one multiplication, which is
/// right for dividends below 2^32 over the divisor.
class Divider {
 public:
  constexpr Divider() = default;
  constexpr explicit Divider(std::int32_t divisor)
      : divisor_(divisor),
        reciprocal_(divisor == 1 ? 0 : UINT32_MAX / static_cast<std::uint32_t>(divisor) + 1) {}

  EXPERTWIRE_HOST_DEVICE std::int32_t quotient(std::int32_t dividend) const {
#if defined(__CUDA_ARCH__)
    return reciprocal_ == 0
               ? dividend
               : static_cast<std::int32_t>(__umulhi(static_cast<unsigned>(dividend), reciprocal_));
#else
    return dividend / divisor_;
#endif
  }
  EXPERTWIRE_HOST_DEVICE std::int32_t rest(std::int32_t dividend) const {
    return dividend - quotient(dividend) * divisor_;
  }

 private:
  std::int32_t divisor_ = 1;
  std::uint32_t reciprocal_ = 0;  // 0: the divisor is 1
};

}  // namespace expertwire::ep
