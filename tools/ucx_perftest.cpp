#include <fmt/format.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <sstream>

#include "bench_channel.hpp"

namespace expertwire::tools {

namespace {

/// What a command prints; empty if it fails.
std::string output_of(const std::string& command) {
  std::string text;
  FILE* pipe = ::popen(command.c_str(), "r");
  if (pipe == nullptr) return text;
  std::array<char, 512> part{};
  while (std::fgets(part.data(), part.size(), pipe) != nullptr) text += part.data();
  return ::pclose(pipe) == 0 ? text : "";
}

/// Server and client of one test on lo, as UCX does it by itself but for the device. Both end by
/// themselves, or after 20 s.
double bandwidth(const char* test, std::size_t bytes, int port) {
  const std::size_t count = std::max<std::size_t>(200, (std::size_t{400} << 20) / bytes);
  const std::string common = fmt::format(
      "env UCX_TLS=tcp UCX_NET_DEVICES=lo UCX_WARN_UNUSED_ENV_VARS=n timeout 20 ucx_perftest -p {} "
      "-t {} -s {} -n {} -w 100",
      port, test, bytes, std::min<std::size_t>(count, 20000));
  const std::string text = output_of(fmt::format(
      "{0} >/dev/null 2>&1 & server=$!; sleep 0.3; {0} 127.0.0.1 -f -v 2>/dev/null; wait $server",
      common));
  // iterations, then latencies (percentile, average, overall), then MB/s (average, overall), ...
  std::istringstream lines(text);
  double result = 0;
  for (std::string line; std::getline(lines, line);) {
    std::array<double, 6> v{};
    if (std::sscanf(line.c_str(), "%lf,%lf,%lf,%lf,%lf,%lf", &v[0], &v[1], &v[2], &v[3], &v[4],
                    &v[5]) == 6)
      result = v[5];
  }
  return result * 1.048576;  // its megabytes are 2^20
}

}  // namespace

UcxPerftest run_ucx_perftest(std::size_t bytes) {
  UcxPerftest result;
  if (output_of("command -v ucx_perftest").empty()) {
    result.why_not = "ucx_perftest is not installed (Debian: ucx-utils)";
    return result;
  }
  const int port = 20000 + static_cast<int>(::getpid()) % 20000;
  result.put_mb_s = bandwidth("ucp_put_bw", bytes, port);
  result.am_mb_s = bandwidth("ucp_am_bw", bytes, port + 1);
  if (result.put_mb_s == 0 && result.am_mb_s == 0) result.why_not = "ucx_perftest failed over lo";
  return result;
}

}  // namespace expertwire::tools
