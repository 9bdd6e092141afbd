#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "ranks/processes.hpp"
#include "ranks/streams.hpp"

namespace expertwire::test {

/// Network namespaces that stand for hosts, joined by veth through a bridge in one more. They go
/// away with this object, and nothing leaves them.
class Hosts {
 public:
  explicit Hosts(int count) : name_("ew" + std::to_string(::getpid())) {
    if (!run("ip netns add " + hub())) return;
    made_ = 1;
    bool good = run("ip -n " + hub() + " link add bridge0 type bridge") &&
                run("ip -n " + hub() + " link set bridge0 up");
    for (int i = 0; good && i < count; ++i) {
      const std::string ns = name(i), port = port_of(i);
      good = run("ip netns add " + ns);
      made_ += good ? 1 : 0;
      good =
          good &&
          run("ip -n " + hub() + " link add " + port + " type veth peer name net0 netns " + ns) &&
          run("ip -n " + hub() + " link set " + port + " master bridge0 up") &&
          run("ip -n " + ns + " addr add " + address(i) + "/24 dev net0") &&
          run("ip -n " + ns + " link set lo up") && run("ip -n " + ns + " link set net0 up");
    }
    good_ = good;
  }
  Hosts(const Hosts&) = delete;
  Hosts& operator=(const Hosts&) = delete;
  ~Hosts() {
    for (int i = 0; i < made_ - 1; ++i) run("ip netns del " + name(i));
    if (made_ > 0) run("ip netns del " + hub());
  }

  /// Why there are none, or empty.
  std::string why_not() const {
    return good_ ? "" : "network namespaces cannot be made here (root and iproute2 are needed)";
  }
  std::string name(int host) const { return name_ + "-" + std::to_string(host); }
  static std::string address(int host) { return "10.83.7." + std::to_string(host + 1); }
  /// The calling process moves to a host, and sees its devices in /sys as well: UCX looks there.
  bool enter(int host) const {
    const int fd = ::open(("/var/run/netns/" + name(host)).c_str(), O_RDONLY | O_CLOEXEC);
    const bool moved = fd >= 0 && ::setns(fd, CLONE_NEWNET) == 0;
    ::close(fd);
    return moved && ::unshare(CLONE_NEWNS) == 0 &&
           ::mount("", "/", "none", MS_SLAVE | MS_REC, nullptr) == 0 &&
           ::umount2("/sys", MNT_DETACH) == 0 && ::mount("sysfs", "/sys", "sysfs", 0, nullptr) == 0;
  }
  bool set_link(int host, bool up) const {
    return run("ip -n " + hub() + " link set " + port_of(host) + (up ? " up" : " down"));
  }
  /// Runs a command on a host; what it says goes nowhere.
  bool on(int host, const std::string& command) const {
    return run("ip netns exec " + name(host) + " " + command);
  }

 private:
  std::string hub() const { return name_ + "-hub"; }
  static std::string port_of(int host) { return "port" + std::to_string(host); }
  static bool run(const std::string& command) {
    return std::system((command + " >/dev/null 2>&1").c_str()) == 0;
  }

  std::string name_;
  int made_ = 0;
  bool good_ = false;
};

/// What a rank on a host is given.
struct OnHost {
  std::shared_ptr<Bootstrap> bootstrap;
  /// Tells the test that this rank is where it is to be disturbed.
  std::function<void()> ready;
  /// Joins another job, of `size` of the ranks, after a failure.
  std::function<std::shared_ptr<Bootstrap>(int rank, int size)> join_again;
};

/// Runs `body`, which returns the exit code, in a process a host, rank i on host i. `disturb` is
/// called with the processes once all are ready; those that it stops are continued and killed in
/// the end. A rank that throws ends with 99.
inline ExitCodes run_on_hosts(const Hosts& hosts, int count,
                              const std::function<int(const OnHost&)>& body,
                              const std::function<void(const std::vector<pid_t>&)>& disturb = {}) {
  const std::string secret = make_secret();
  const auto rendezvous = [&](int rank, int size, int port) {
    return bootstrap_from_rendezvous({rank, size, Hosts::address(0) + ":" + std::to_string(port),
                                      secret, std::chrono::milliseconds(20000)});
  };
  int ready[2];
  if (::pipe2(ready, O_CLOEXEC) != 0) return {};
  std::vector<pid_t> pids;
  std::fflush(nullptr);
  for (int rank = 0; rank < count; ++rank) {
    const pid_t pid = ::fork();
    if (pid == 0) {
      int code = 98;
      try {
        if (hosts.enter(rank))
          code = body({rendezvous(rank, count, 7001),
                       [&] {
                         if (::write(ready[1], "r", 1) != 1) ::_exit(97);
                       },
                       [&](int again, int size) { return rendezvous(again, size, 7002); }});
      } catch (const std::exception& error) {
        fmt::print(stderr, "rank {}: {}\n", rank, error.what());
        code = 99;
      }
      std::fflush(nullptr);
      ::_exit(testing::Test::HasFailure() ? 96 : code);
    }
    pids.push_back(pid);
  }
  ::close(ready[1]);
  char byte = 0;
  for (int i = 0; disturb && i < count; ++i)
    if (::read(ready[0], &byte, 1) != 1) break;
  if (disturb) disturb(pids);
  ExitCodes codes;
  for (pid_t pid : pids) {
    int status = 0;
    pid_t ended = 0;
    // One that is stopped would never end: it is killed when all others have ended.
    const Deadline deadline = Deadline::after(std::chrono::seconds(60));
    while ((ended = ::waitpid(pid, &status, WNOHANG | WUNTRACED)) == 0 && !deadline.expired())
      ::usleep(1000);
    if (ended == 0 || WIFSTOPPED(status)) {
      codes.push_back(-pid);
      continue;
    }
    codes.push_back(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
  }
  for (int& code : codes) {
    if (code >= 0) continue;
    ::kill(-code, SIGKILL);
    ::waitpid(-code, nullptr, 0);
    code = 128 + SIGKILL;
  }
  ::close(ready[0]);
  return codes;
}

}  // namespace expertwire::test
