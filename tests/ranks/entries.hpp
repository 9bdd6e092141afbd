#pragma once

#include <filesystem>
#include <iterator>

namespace expertwire::test {

/// What the system lists of this process: "fd", or "task" for its threads.
inline std::ptrdiff_t entries_of(const char* folder) {
  const auto all =
      std::filesystem::directory_iterator(std::filesystem::path("/proc/self") / folder);
  return std::distance(begin(all), end(all));
}

}  // namespace expertwire::test
