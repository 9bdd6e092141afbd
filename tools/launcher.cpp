#include "launcher.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>

#include "base/env.hpp"
#include "comm/secret.hpp"

extern char** environ;

namespace expertwire::tools {

namespace {

struct Child {
  pid_t pid = -1;
  bool running = false;
};

[[noreturn]] void become_rank(const LaunchRequest& request, int rank, const std::string& job,
                              const std::string& secret, pid_t parent) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != parent) ::_exit(1);
  // Later entries of an environment are not looked at, so ours go first.
  std::vector<std::string> settings = {fmt::format("EXPERTWIRE_RANK={}", rank),
                                       fmt::format("EXPERTWIRE_SIZE={}", request.ranks),
                                       fmt::format("EXPERTWIRE_LOCAL_SIZE={}", request.ranks),
                                       "EXPERTWIRE_JOB=" + job, "EXPERTWIRE_SECRET=" + secret};
  std::vector<char*> environment, arguments;
  for (std::string& setting : settings) environment.push_back(setting.data());
  for (char** entry = environ; *entry != nullptr; ++entry) environment.push_back(*entry);
  environment.push_back(nullptr);
  std::vector<std::string> command = request.command;
  for (std::string& word : command) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  ::execvpe(arguments[0], arguments.data(), environment.data());
  fmt::print(stderr, "expertwire: cannot start {}: {}\n", command[0], std::strerror(errno));
  ::_exit(127);
}

int exit_status(int status) {
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

void end_all(const std::vector<Child>& children) {
  for (const Child& child : children)
    if (child.running) ::kill(child.pid, SIGKILL);
}

}  // namespace

int launch(const LaunchRequest& request) {
  std::string name(16, '\0');
  fill_random(name.data(), name.size());
  const std::string job = to_hex(name.data(), name.size());
  const std::string secret = make_secret();
  const std::string secret_hex = to_hex(secret.data(), secret.size());
  const pid_t self = ::getpid();
  ::signal(SIGCHLD, SIG_DFL);  // if it is ignored, children cannot be waited for

  std::vector<Child> children;
  children.reserve(static_cast<std::size_t>(request.ranks));
  for (int rank = 0; rank < request.ranks; ++rank) {
    const pid_t pid = ::fork();
    if (pid == 0) become_rank(request, rank, job, secret_hex, self);
    if (pid < 0) {
      fmt::print(stderr, "expertwire: cannot start rank {}: {}\n", rank, std::strerror(errno));
      end_all(children);
      return 1;
    }
    children.push_back({pid, true});
  }

  using Clock = std::chrono::steady_clock;
  const auto patience = std::chrono::milliseconds(Env::get().timeout_ms) + std::chrono::seconds(5);
  Clock::time_point last_moment = Clock::time_point::max();
  int result = 0;
  for (int running = request.ranks; running > 0;) {
    int status = 0;
    const bool hurry = last_moment != Clock::time_point::max();
    const pid_t pid = ::waitpid(-1, &status, hurry ? WNOHANG : 0);
    if (pid < 0 && errno == ECHILD) return result != 0 ? result : 1;
    if (pid == 0) {
      if (Clock::now() > last_moment) {
        fmt::print(stderr, "expertwire: ranks did not end after a failure; ending them\n");
        end_all(children);
        last_moment = Clock::time_point::max();
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
      continue;
    }
    for (int rank = 0; rank < request.ranks; ++rank) {
      Child& child = children[static_cast<std::size_t>(rank)];
      if (child.pid != pid) continue;
      child.running = false;
      --running;
      const int code = exit_status(status);
      if (code == 0) break;
      if (WIFSIGNALED(status))
        fmt::print(stderr, "expertwire: rank {} (pid {}) was ended by signal {}\n", rank, pid,
                   WTERMSIG(status));
      if (result == 0) {
        result = code;
        last_moment = Clock::now() + patience;
      }
    }
  }
  return result;
}

int become(std::vector<std::string> command) {
  std::vector<char*> arguments;
  arguments.reserve(command.size() + 1);
  for (std::string& word : command) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  ::execvp(arguments[0], arguments.data());
  fmt::print(stderr, "expertwire: cannot start {}: {}\n", command[0], std::strerror(errno));
  return 127;
}

std::vector<std::string> own_command(int argc, char** argv) {
  std::vector<std::string> command{"/proc/self/exe"};
  std::string path(4096, '\0');
  const ssize_t length = ::readlink("/proc/self/exe", path.data(), path.size());
  if (length > 0) command[0] = path.substr(0, static_cast<std::size_t>(length));
  for (int i = 1; i < argc; ++i) command.emplace_back(argv[i]);
  return command;
}

}  // namespace expertwire::tools
