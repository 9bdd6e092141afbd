#pragma once

#include <fmt/format.h>

#include <string_view>
#include <utility>

namespace expertwire::inline v0 {

enum class LogLevel { trace, debug, info, warn, error, off };
enum class Subsystem { boot, topo, mem, conn, ep, tool };

/// Whether a line of this level and subsystem would be written: one load and one compare.
bool log_enabled(LogLevel level, Subsystem subsystem) noexcept;

/// Throws `Error{invalid_argument}` if the logging variables make no sense.
void check_log_settings();

/// Writes one line to the sink that `EXPERTWIRE_LOG_FILE` names. Thread-safe.
void log_line(LogLevel level, Subsystem subsystem, std::string_view line) noexcept;

template <class... Args>
void log(LogLevel level, Subsystem subsystem, fmt::format_string<Args...> text, Args&&... args) {
  if (log_enabled(level, subsystem))
    log_line(level, subsystem, fmt::format(text, std::forward<Args>(args)...));
}

}  // namespace expertwire
