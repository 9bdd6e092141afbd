#pragma once

#include <string>
#include <vector>

namespace expertwire::tools {

/// What `expertwire demo` was asked for.
struct DemoOptions {
  int ranks = 4;
  int tokens = 1024;       ///< of a rank, high throughput
  int small_tokens = 128;  ///< of a rank, low latency
};

/// A DeepSeek-V3-shaped MoE layer over the ranks of this machine, in both modes, every value
/// compared with a single-process reference. Returns an exit status.
int run_demo(const DemoOptions& options, const std::vector<std::string>& command);

}  // namespace expertwire::tools
