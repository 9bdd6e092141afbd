#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace expertwire::inline v0::ep::cpu {

/// The threads with which one lane of one rank works; the CPU's counterpart of a grid of blocks.
/// The caller of run() is worker 0. Parked threads cost nothing.
class Team {
 public:
  /// Throws `Error{system}` if the system gives no more threads.
  explicit Team(int workers);
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;
  ~Team();

  int size() const { return static_cast<int>(threads_.size()) + 1; }

  /// Runs `body(worker)` on every worker and returns when all are done: what they wrote is visible
  /// to the caller. If some throw, the first to throw wins and `failed()` is set meanwhile.
  void run(const std::function<void(int worker)>& body);

  /// True while a worker of the current run has thrown; the others look at it in their waits.
  const std::atomic<bool>* failed() const { return &failed_; }

 private:
  void serve(int worker);
  void call(int worker) noexcept;
  void end();

  std::vector<std::thread> threads_;
  const std::function<void(int)>* body_ = nullptr;
  std::atomic<std::uint32_t> generation_{0};
  std::atomic<int> running_{0};
  std::atomic<bool> ending_{false};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::exception_ptr error_;
};

/// The part of `count` items that `worker` of `workers` owns: contiguous, in order.
struct Span {
  std::int64_t begin;
  std::int64_t end;
};
inline Span part_of(std::int64_t count, int worker, int workers) {
  return {count * worker / workers, count * (worker + 1) / workers};
}

}  // namespace expertwire::ep::cpu
