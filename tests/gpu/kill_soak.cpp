// kill_soak: ranks that are killed or stopped at a random moment while work of theirs is on streams
// or in replays of a graph; the other rank must name them. Two GPUs, a process each. Prints a line
// a round, then how long it took to name them; exits 1 if a round went wrong.
//
//   kill_soak ROUNDS kill|stop stream|graph [LIMIT_MS]
//
// Time counts from the signal; for a stopped rank, from the deadline after it (a process that is
// stopped cannot be told from a slow one before).

#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <deque>
#include <random>
#include <string>
#include <thread>

#include "comm/secret.hpp"
#include "expertwire/expertwire.hpp"
#include "gpu/buffers.hpp"

extern char** environ;

namespace expertwire::test {
namespace {

using reference::RoutingPattern;
using reference::Workload;
using std::chrono::milliseconds;

constexpr milliseconds kTimeout{200};  // of every wait of an operation
const MoeShape kShape{1024, 32, 4, 64, DType::bf16};

struct Plan {
  bool stops = false, graph = false;
  int round = 0;
  std::string address, secret;
};

double now_ms() {  // of a clock that all processes share
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) * 1e3 + static_cast<double>(t.tv_nsec) / 1e6;
}

/// What both ranks do: pairs of operations, a few ahead of the device, until something is wrong.
class Work {
 public:
  Work(const std::shared_ptr<Communicator>& communicator, const Plan& plan)
      : communicator_(communicator),
        plan_(plan),
        buffers_(communicator->cuda_device()),
        stream_(Stream::cuda(buffers_.stream())),
        in_(buffers_, kShape, kShape.max_tokens) {
    const Workload workload({kShape, 2, 9, RoutingPattern::parse("uniform")});
    const auto input = workload.input(communicator->rank(), plan.round);
    in_.fill(buffers_, input);
    buffers_.synchronize();
    if (plan.round % 2 == 0)
      ll_ = LowLatency::create(communicator, {kShape});
    else
      ht_ = HighThroughput::create(communicator, {kShape});
    const std::int64_t rows = 2 * kShape.max_tokens;
    ll_out_ = {buffers_.make(kShape.dtype, {16, rows, kShape.hidden}),
               buffers_.make(DType::int32, {16}), buffers_.make(DType::int32, {16, 2, 2}),
               buffers_.make(DType::int32, {16, rows})};
    ht_out_ = {buffers_.make(kShape.dtype, {rows, kShape.hidden}),
               buffers_.make(DType::int32, {rows}),
               buffers_.make(DType::int32, {rows, kShape.top_k}),
               buffers_.make(DType::fp32, {rows, kShape.top_k})};
    out_ = buffers_.make(kShape.dtype, {kShape.max_tokens, kShape.hidden});
    pair();
    buffers_.synchronize();
    if (plan.graph) capture();
    for (cudaEvent_t& event : events_)
      check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  }
  ~Work() {
    if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
    for (cudaEvent_t event : events_) cudaEventDestroy(event);
  }

  /// Throws what goes wrong; a call or status() has it.
  [[noreturn]] void run() {
    for (std::size_t i = 0;; ++i) {
      cudaEvent_t& event = events_[i % events_.size()];
      while (i >= events_.size() && cudaEventQuery(event) == cudaErrorNotReady) {
        look();
        std::this_thread::yield();
      }
      if (plan_.graph)
        check_cuda(cudaGraphLaunch(graph_, buffers_.stream()), "cudaGraphLaunch");
      else
        pair();
      check_cuda(cudaEventRecord(event, buffers_.stream()), "cudaEventRecord");
      look();
    }
  }

 private:
  void look() const { (ll_ ? ll_->status() : ht_->status()).check(); }
  void pair() {
    if (ll_) return pair_of(*ll_, ll_out_);
    pair_of(*ht_, ht_out_);
  }
  template <class Object, class Outputs>
  void pair_of(Object& object, const Outputs& outputs) {
    typename Object::DispatchRequest dispatch;
    dispatch.x = in_.x;
    dispatch.topk_idx = in_.topk_idx;
    dispatch.topk_weights = in_.topk_weights;
    dispatch.outputs = outputs;
    dispatch.stream = stream_;
    dispatch.timeout = kTimeout;
    if constexpr (requires { dispatch.capacity; }) dispatch.capacity = 2 * kShape.max_tokens;
    typename Object::CombineRequest combine;
    combine.handle = object.dispatch(dispatch).handle;
    combine.y = outputs.x;
    combine.out = out_;
    combine.stream = stream_;
    combine.timeout = kTimeout;
    object.combine(combine);
  }
  void capture() {
    cudaGraph_t graph = nullptr;
    check_cuda(cudaStreamBeginCapture(buffers_.stream(), cudaStreamCaptureModeGlobal), "capture");
    for (int i = 0; i < 3; ++i) pair();
    check_cuda(cudaStreamEndCapture(buffers_.stream(), &graph), "cudaStreamEndCapture");
    check_cuda(cudaGraphInstantiate(&graph_, graph, 0), "cudaGraphInstantiate");
    cudaGraphDestroy(graph);
  }

  std::shared_ptr<Communicator> communicator_;
  const Plan& plan_;
  Buffers buffers_;
  Stream stream_;
  StepInputs in_;
  std::unique_ptr<LowLatency> ll_;
  std::unique_ptr<HighThroughput> ht_;
  LowLatency::Outputs ll_out_;
  HighThroughput::Outputs ht_out_;
  TensorView out_;
  cudaGraphExec_t graph_ = nullptr;
  std::array<cudaEvent_t, 4> events_{};
};

std::shared_ptr<Communicator> join(const Plan& plan, int rank) {
  CommunicatorOptions options;
  options.cuda_device = rank;
  options.arena_bytes = std::size_t{256} << 20;
  options.timeout = milliseconds(20000);
  return Communicator::create(
      bootstrap_from_rendezvous({rank, 2, plan.address, plan.secret, milliseconds(60000)}),
      options);
}

/// Says when, on standard output, and ends or stops.
void be_victim(const Plan& plan) {
  check_cuda(cudaSetDevice(1), "cudaSetDevice");
  check_cuda(cudaFree(nullptr), "cudaFree");
  auto communicator = join(plan, 1);
  Work work(communicator, plan);
  communicator->barrier();
  std::mt19937 draw(static_cast<unsigned>(plan.round) * 7919U + 13U);
  const std::jthread killer([delay = std::uniform_int_distribution<>(500, 30000)(draw), &plan] {
    std::this_thread::sleep_for(std::chrono::microseconds(delay));
    const double now = now_ms();
    if (::write(STDOUT_FILENO, &now, sizeof(now)) == sizeof(now))
      ::kill(::getpid(), plan.stops ? SIGSTOP : SIGKILL);
  });
  work.run();  // the killer comes first
}

struct Victim {
  pid_t pid = -1;
  int out = -1;  // its standard output
  Plan plan;
};

Victim start_victim(const Plan& like, int round) {
  Victim victim{-1, -1, like};
  victim.plan.round = round;
  victim.plan.secret = make_secret();
  victim.plan.address = fmt::format("@ew-soak-{}-{}", ::getpid(), round);
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) throw std::runtime_error("pipe2 failed");
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
  // The secret goes by a variable, as it does in a job.
  std::vector<std::string> variables{"KILL_SOAK_SECRET=" +
                                     to_hex(victim.plan.secret.data(), victim.plan.secret.size())};
  std::vector<char*> environment{variables[0].data()};
  for (char** variable = environ; *variable != nullptr; ++variable)
    environment.push_back(*variable);
  environment.push_back(nullptr);
  std::vector<std::string> words{"kill_soak",
                                 "victim",
                                 std::to_string(round),
                                 like.stops ? "stop" : "kill",
                                 like.graph ? "graph" : "stream",
                                 victim.plan.address};
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  victim.plan.secret = to_hex(victim.plan.secret.data(), victim.plan.secret.size());
  if (::posix_spawn(&victim.pid, "/proc/self/exe", &actions, nullptr, arguments.data(),
                    environment.data()) != 0)
    throw std::runtime_error("posix_spawn failed");
  posix_spawn_file_actions_destroy(&actions);
  ::close(ends[1]);
  victim.out = ends[0];
  return victim;
}

/// Milliseconds until the victim was named, or an error in words.
double survive(const Victim& victim, std::string* wrong) {
  const bool stops = victim.plan.stops;
  double named = 0;
  {
    auto communicator = join(victim.plan, 0);
    Work work(communicator, victim.plan);
    communicator->barrier();
    try {
      work.run();
    } catch (const Error& error) {
      const ErrorCode code = stops ? ErrorCode::timeout : ErrorCode::peer_lost;
      if (error.code() != code || error.peer() != 1) *wrong = error.what();
    }
    named = now_ms();
  }
  double signalled = 0;
  if (::read(victim.out, &signalled, sizeof(signalled)) != sizeof(signalled)) *wrong = "no signal";
  ::close(victim.out);
  if (stops) ::kill(victim.pid, SIGKILL);
  int status = 0;
  ::waitpid(victim.pid, &status, 0);
  return named - signalled - (stops ? static_cast<double>(kTimeout.count()) : 0);
}

int soak(int rounds, const Plan& like, double limit_ms) {
  constexpr int kAhead = 4;  // victims that start while others die; each takes queues of the GPU
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices < 2)
    return fmt::print("kill_soak: two GPUs are needed, {} are here\n", devices), 2;
  check_cuda(cudaSetDevice(0), "cudaSetDevice");
  std::deque<Victim> waiting;
  std::vector<double> times;
  int bad = 0;
  for (int round = 0, started = 0; round < rounds; ++round) {
    for (; started < rounds && started < round + kAhead; ++started)
      waiting.push_back(start_victim(like, started));
    std::string wrong;
    const double ms = survive(waiting.front(), &wrong);
    waiting.pop_front();
    if (ms > limit_ms && wrong.empty()) wrong = fmt::format("named after {:.1f} ms", ms);
    if (!wrong.empty()) ++bad, fmt::print("round {}: {}\n", round, wrong);
    times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  const auto at = [&](double q) {
    return times[static_cast<std::size_t>(q * static_cast<double>(times.size() - 1))];
  };
  fmt::print("{} {}: {} of {} named within {:.0f} ms; ms p50 {:.1f}, p90 {:.1f}, max {:.1f}\n",
             like.stops ? "stop" : "kill", like.graph ? "graph" : "stream", rounds - bad, rounds,
             limit_ms, at(0.5), at(0.9), at(1));
  return bad == 0 ? 0 : 1;
}

int run(int argc, char** argv) {
  const std::vector<std::string> words(argv + 1, argv + argc);
  if (words.size() == 5 && words[0] == "victim") {
    std::string secret;
    for (char** variable = environ; *variable != nullptr; ++variable)
      if (const std::string text = *variable; text.rfind("KILL_SOAK_SECRET=", 0) == 0)
        secret = text.substr(17);
    be_victim({words[2] == "stop", words[3] == "graph", std::stoi(words[1]), words[4], secret});
    return 0;
  }
  if (words.size() < 3)
    return fmt::print("kill_soak ROUNDS kill|stop stream|graph [LIMIT_MS]\n"), 2;
  return soak(std::stoi(words[0]), {words[1] == "stop", words[2] == "graph", 0, "", ""},
              words.size() > 3 ? std::stod(words[3]) : 50);
}

}  // namespace
}  // namespace expertwire::test

int main(int argc, char** argv) try {
  return expertwire::test::run(argc, argv);
} catch (const std::exception& error) {
  fmt::print(stderr, "kill_soak: {}\n", error.what());
  return 1;
}
