#pragma once

#include <memory>
#include <string>
#include <vector>

#include "comm/proxy/engine.hpp"

namespace expertwire::inline v0 {

/// What is known of UCX where the build may have no headers of it.
struct UcxPresence {
  bool present = false;
  std::string version;  ///< "1.13.1"; empty: none
  std::string why_not;
};
const UcxPresence& ucx_presence();

/// `count` workers of one UCX context, for a job of `ranks` ranks. Throws `Error{system}` with
/// UCX's reason.
std::vector<std::unique_ptr<Engine>> make_ucx_engines(int count, int ranks);

}  // namespace expertwire
