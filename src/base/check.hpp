#pragma once

#include <fmt/format.h>

#include <utility>

#include "expertwire/error.hpp"

namespace expertwire::inline v0 {

/// Throws `Error{code}` with the formatted message unless `ok`.
template <class... Args>
void check(bool ok, ErrorCode code, fmt::format_string<Args...> message, Args&&... args) {
  if (!ok) [[unlikely]] {
    throw Error(code, fmt::format(message, std::forward<Args>(args)...));
  }
}

/// Throws `Error{invalid_argument}` with the formatted message unless `ok`.
template <class... Args>
void check_argument(bool ok, fmt::format_string<Args...> message, Args&&... args) {
  check(ok, ErrorCode::invalid_argument, message, std::forward<Args>(args)...);
}

/// Throws `Error{system}` naming the call and errno's text unless `result >= 0`; returns `result`.
int check_system(int result, const char* call);

/// Throws `Error{system}` for an errno value already saved.
[[noreturn]] void throw_system(const char* call, int error_number);

}  // namespace expertwire
