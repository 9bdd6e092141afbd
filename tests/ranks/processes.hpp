#pragma once

#include <fmt/format.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "comm/secret.hpp"
#include "expertwire/bootstrap.hpp"

namespace expertwire::test {

/// How a rank process ended: exit code, or 128 + signal.
using ExitCodes = std::vector<int>;

/// Runs `body(bootstrap)` in `size` forked processes, one a rank. The body returns the exit code;
/// one that throws ends with 99.
inline ExitCodes run_processes(
    int size, const std::function<int(std::shared_ptr<Bootstrap>)>& body,
    std::chrono::milliseconds timeout = std::chrono::milliseconds(20000)) {
  const std::string secret = make_secret();
  const std::string address = "@ew-test-" + to_hex(make_secret().data(), 12);
  std::vector<pid_t> children;
  std::fflush(nullptr);
  for (int rank = 0; rank < size; ++rank) {
    const pid_t pid = ::fork();
    if (pid == 0) {
      int code = 99;
      try {
        code = body(bootstrap_from_rendezvous({rank, size, address, secret, timeout}));
      } catch (const std::exception& error) {
        fmt::print(stderr, "rank {}: {}\n", rank, error.what());
      }
      std::fflush(nullptr);
      ::_exit(code);
    }
    children.push_back(pid);
  }
  ExitCodes codes;
  for (pid_t pid : children) {
    int status = 0;
    ::waitpid(pid, &status, 0);
    codes.push_back(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
  }
  return codes;
}

}  // namespace expertwire::test
