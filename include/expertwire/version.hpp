#pragma once

namespace expertwire {

inline constexpr const char* kVersion = "0.1.0";

}  // namespace expertwire
