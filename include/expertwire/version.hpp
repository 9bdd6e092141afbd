#pragma once

namespace expertwire::inline v0 {

inline constexpr const char* kVersion = "0.1.0";

}  // namespace expertwire
