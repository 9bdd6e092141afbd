#include "launcher.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>

#include "base/env.hpp"
#include "comm/secret.hpp"

extern char** environ;

namespace expertwire::tools {

namespace {

/// A rank: a process group of its own, so that what a script of a rank has started ends with it.
struct Child {
  pid_t pid = -1;
  bool running = false;
};

/// The signals that end a job. launch() takes them one by one.
sigset_t ending_signals() {
  sigset_t set;
  sigemptyset(&set);
  for (int signal : {SIGTERM, SIGINT, SIGHUP, SIGPIPE, SIGQUIT, SIGCHLD}) sigaddset(&set, signal);
  return set;
}

/// Ends the groups of a job whose launcher is gone, also by SIGKILL: a process that holds nothing
/// but the end of a pipe on which it is told of them.
class Guard {
 public:
  Guard() {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) return;
    const pid_t pid = ::fork();
    if (pid == 0) {
      ::close(ends[1]);
      watch(ends[0]);
    }
    ::close(ends[0]);
    tell_ = ends[1];
    pid_ = pid;
  }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;
  ~Guard() {
    if (tell_ >= 0) ::close(tell_);
    if (pid_ > 0) ::waitpid(pid_, nullptr, 0);
  }
  void add(pid_t group) const {
    if (tell_ >= 0 && ::write(tell_, &group, sizeof(group)) < 0)
      fmt::print(stderr, "expertwire: the guard of this job is gone\n");
  }
  pid_t pid() const { return pid_; }

 private:
  [[noreturn]] static void watch(int told) {
    ::setsid();
    const int nowhere = ::open("/dev/null", O_RDWR | O_CLOEXEC);
    for (int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) ::dup2(nowhere, fd);
    std::vector<pid_t> groups;
    for (pid_t group = 0; ::read(told, &group, sizeof(group)) == sizeof(group);)
      groups.push_back(group);
    for (pid_t group : groups) ::kill(-group, SIGKILL);
    ::_exit(0);
  }

  int tell_ = -1;
  pid_t pid_ = -1;
};

[[noreturn]] void become_rank(const LaunchRequest& request, int rank, const std::string& job,
                              const std::string& secret, pid_t parent) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != parent) ::_exit(1);
  ::setpgid(0, 0);
  const sigset_t ours = ending_signals();
  ::sigprocmask(SIG_UNBLOCK, &ours, nullptr);
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

/// To the groups of all ranks, also of those that have ended: what they started may be there still.
void signal_all(const std::vector<Child>& children, int signal) {
  for (const Child& child : children) ::kill(-child.pid, signal);
}

/// A job from its start to its end.
class Job {
 public:
  explicit Job(const LaunchRequest& request) : request_(request) {}
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;
  ~Job() { signal_all(children_, SIGKILL); }

  bool start();
  int wait();

 private:
  using Clock = std::chrono::steady_clock;

  void take_ended();
  void note_end(int rank, int status);
  void take_signal(int signal);
  void end_by(std::chrono::milliseconds patience) {
    last_moment_ = std::min(last_moment_, Clock::now() + patience);
  }

  const LaunchRequest& request_;
  Guard guard_;
  std::vector<Child> children_;
  int running_ = 0, result_ = 0;
  Clock::time_point last_moment_ = Clock::time_point::max();
};

bool Job::start() {
  std::string name(16, '\0');
  fill_random(name.data(), name.size());
  const std::string job = to_hex(name.data(), name.size());
  const std::string secret = make_secret();
  const std::string secret_hex = to_hex(secret.data(), secret.size());
  const pid_t self = ::getpid();
  for (int rank = 0; rank < request_.ranks; ++rank) {
    const pid_t pid = ::fork();
    if (pid == 0) become_rank(request_, rank, job, secret_hex, self);
    if (pid < 0) {
      fmt::print(stderr, "expertwire: cannot start rank {}: {}\n", rank, std::strerror(errno));
      return false;
    }
    ::setpgid(pid, pid);  // here, too: it may not have come to it yet
    guard_.add(pid);
    children_.push_back({pid, true});
    ++running_;
  }
  return true;
}

void Job::note_end(int rank, int status) {
  children_[static_cast<std::size_t>(rank)].running = false;
  --running_;
  const int code = exit_status(status);
  if (code == 0) return;
  const pid_t pid = children_[static_cast<std::size_t>(rank)].pid;
  if (WIFSIGNALED(status))
    fmt::print(stderr, "expertwire: rank {} (pid {}) was ended by signal {}\n", rank, pid,
               WTERMSIG(status));
  else if (result_ == 0)
    fmt::print(stderr, "expertwire: rank {} (pid {}) failed first, with status {}\n", rank, pid,
               code);
  if (result_ != 0) return;
  result_ = code;
  // The others get their deadline to find out.
  end_by(std::chrono::milliseconds(Env::get().timeout_ms) + std::chrono::seconds(5));
}

void Job::take_ended() {
  int status = 0;
  for (pid_t pid = 0; (pid = ::waitpid(-1, &status, WNOHANG)) > 0;)
    for (int rank = 0; rank < static_cast<int>(children_.size()); ++rank)
      if (children_[static_cast<std::size_t>(rank)].pid == pid) note_end(rank, status);
}

/// A signal to this process ends the job: the ranks get it, and a moment to obey.
void Job::take_signal(int signal) {
  fmt::print(stderr, "expertwire: signal {} ends this job\n", signal);
  if (result_ == 0) result_ = 128 + signal;
  signal_all(children_, signal == SIGPIPE ? SIGTERM : signal);
  end_by(std::chrono::seconds(2));
}

int Job::wait() {
  const sigset_t set = ending_signals();
  for (take_ended(); running_ > 0; take_ended()) {
    const timespec moment{0, 20'000'000};
    const int signal = ::sigtimedwait(&set, nullptr, &moment);
    if (signal > 0 && signal != SIGCHLD) take_signal(signal);
    if (Clock::now() <= last_moment_) continue;
    fmt::print(stderr, "expertwire: ranks did not end after a failure; ending them\n");
    signal_all(children_, SIGKILL);
    last_moment_ = Clock::time_point::max();
  }
  return result_;
}

}  // namespace

int launch(const LaunchRequest& request) {
  ::signal(SIGCHLD, SIG_DFL);  // if it is ignored, children cannot be waited for
  std::fflush(nullptr);        // children would say it again
  const sigset_t set = ending_signals();
  sigset_t before;
  ::sigprocmask(SIG_BLOCK, &set, &before);
  int result = 1;
  {
    Job job(request);
    if (job.start()) result = job.wait();
  }
  ::sigprocmask(SIG_SETMASK, &before, nullptr);
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
