#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace expertwire::tools {

/// What `expertwire verify` was asked for.
struct VerifyOptions {
  int ranks = 0;  ///< 0: drawn for each case, 1 to 8
  bool processes = false;
  double seconds = 30;
  std::int64_t cases = 0;  ///< 0: until the time is up
  std::uint64_t seed = 1;
  std::string device = "auto";        ///< cpu, cuda or auto
  std::optional<std::uint64_t> only;  ///< one case, by its number
};

/// Random configurations against the reference. Returns an exit status.
int run_verify(const VerifyOptions& options, const std::vector<std::string>& command);

}  // namespace expertwire::tools
