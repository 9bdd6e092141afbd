#pragma once

#include <cstddef>

namespace expertwire::inline v0::ep::cpu {

/// Whether `bytes` written by one operation are better stored past the caches: they would not stay
/// there anyway, and a store that passes them does not first read the line it overwrites.
inline bool passes_caches(std::size_t bytes) {
  constexpr std::size_t kThreshold = std::size_t{4} << 20;
  return bytes > kThreshold;
}

}  // namespace expertwire::ep::cpu
