#pragma once

#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include "comm/secret.hpp"
#include "expertwire/bootstrap.hpp"

namespace expertwire::test {

/// How a rank process ended: exit code, or 128 + signal.
using ExitCodes = std::vector<int>;

namespace processes {

/// What a rank's process is told.
struct Place {
  int rank, size;
  std::string address, secret;
  std::chrono::milliseconds timeout;
};

/// The end of a rank's process.
[[noreturn]] inline void be_rank(const Place& place,
                                 const std::function<int(std::shared_ptr<Bootstrap>)>& body) {
  int code = 99;
  try {
    code = body(bootstrap_from_rendezvous(
        {place.rank, place.size, place.address, place.secret, place.timeout}));
  } catch (const std::exception& error) {
    fmt::print(stderr, "rank {}: {}\n", place.rank, error.what());
  }
  std::fflush(nullptr);
  ::_exit(code);
}

#if defined(EXPERTWIRE_TEST_ON_CUDA)

// A context of CUDA does not survive a fork, so a rank is this program again, with this test alone,
// which comes to the same call and is told on its standard input who it is.
inline constexpr char kAsRank[] = "--as-rank";

inline bool is_rank() {
  std::ifstream line("/proc/self/cmdline");
  const std::string words((std::istreambuf_iterator<char>(line)), {});
  return words.find(kAsRank) != std::string::npos;
}

inline Place read_place() {
  Place place{};
  std::string secret;
  long long timeout = 0;
  std::cin >> place.rank >> place.size >> place.address >> secret >> timeout;
  place.secret = secret;
  place.timeout = std::chrono::milliseconds(timeout);
  return place;
}

inline pid_t start(const Place& place) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return -1;
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, ends[0], STDIN_FILENO);
  const testing::TestInfo& test = *testing::UnitTest::GetInstance()->current_test_info();
  std::string filter = fmt::format("--gtest_filter={}.{}", test.test_suite_name(), test.name());
  std::string words[] = {"rank", filter, kAsRank};
  char* arguments[] = {words[0].data(), words[1].data(), words[2].data(), nullptr};
  pid_t pid = -1;
  if (::posix_spawn(&pid, "/proc/self/exe", &actions, nullptr, arguments, environ) != 0) pid = -1;
  posix_spawn_file_actions_destroy(&actions);
  const std::string told =
      fmt::format("{} {} {} {} {}\n", place.rank, place.size, place.address,
                  to_hex(place.secret.data(), place.secret.size()), place.timeout.count());
  if (::write(ends[1], told.data(), told.size()) < 0) ::kill(pid, SIGKILL);
  ::close(ends[0]);
  ::close(ends[1]);
  return pid;
}

#endif

}  // namespace processes

/// Runs `body(bootstrap)` in `size` processes, one a rank. The body returns the exit code; one that
/// throws ends with 99.
inline ExitCodes run_processes(
    int size, const std::function<int(std::shared_ptr<Bootstrap>)>& body,
    std::chrono::milliseconds timeout = std::chrono::milliseconds(20000)) {
#if defined(EXPERTWIRE_TEST_ON_CUDA)
  if (processes::is_rank()) processes::be_rank(processes::read_place(), body);
#endif
  const std::string secret = make_secret();
  const std::string address = "@ew-test-" + to_hex(make_secret().data(), 12);
  std::vector<pid_t> children;
  std::fflush(nullptr);
  for (int rank = 0; rank < size; ++rank) {
    const processes::Place place{rank, size, address, secret, timeout};
#if defined(EXPERTWIRE_TEST_ON_CUDA)
    children.push_back(processes::start(place));
#else
    const pid_t pid = ::fork();
    if (pid == 0) processes::be_rank(place, body);
    children.push_back(pid);
#endif
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
