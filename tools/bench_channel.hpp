#pragma once

#include <string>
#include <vector>

namespace expertwire::tools {

/// What `expertwire bench channel` was asked for.
struct ChannelBenchOptions {
  std::vector<std::size_t> sizes{8, 14336, 57344, 1 << 20};
  std::string wire;      ///< loopback, shm or ucx; empty: all that there are, or a launcher's
  double seconds = 0.3;  ///< about, for each figure
  std::string json;
};

/// Measures wires between two ranks, and the queue of proxies. Returns an exit status.
int run_bench_channel(const ChannelBenchOptions& options, const std::vector<std::string>& command);

/// Bandwidth of UCX's own benchmark over lo, MB/s, or why there is none.
struct UcxPerftest {
  std::string why_not;
  double put_mb_s = 0, am_mb_s = 0;
};
UcxPerftest run_ucx_perftest(std::size_t bytes);

}  // namespace expertwire::tools
