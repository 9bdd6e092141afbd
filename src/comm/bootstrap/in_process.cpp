#include <condition_variable>
#include <cstring>
#include <exception>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <thread>

#include "base/check.hpp"
#include "base/log.hpp"
#include "expertwire/bootstrap.hpp"

namespace expertwire::inline v0 {

namespace {

/// What the thread ranks of one job share.
class Group {
 public:
  explicit Group(int size) : here_(static_cast<std::size_t>(size), Presence::away) {}

  int size() const { return static_cast<int>(here_.size()); }

  void all_gather(int rank, char* data, std::size_t bytes, Deadline deadline) {
    std::unique_lock lock(mutex_);
    // The call before must be over; after a failure every call fails.
    wait(lock, rank, deadline, [&] { return leaving_ == 0 && !verdict_; });
    if (arrived_ == 0) buffer_.assign(here_.size() * bytes, 0);
    if (buffer_.size() != here_.size() * bytes)
      fail(rank, {ErrorCode::mismatch, rank,
                  fmt::format("all_gather: rank {} came with {} bytes a rank, others with {}; do "
                              "all ranks make the same calls?",
                              rank, bytes, buffer_.size() / here_.size())});
    const std::size_t mine = static_cast<std::size_t>(rank) * bytes;
    if (bytes > 0) std::memcpy(buffer_.data() + mine, data + mine, bytes);
    here_[static_cast<std::size_t>(rank)] = Presence::waiting;
    const std::uint64_t generation = generation_;
    if (++arrived_ == size()) {
      arrived_ = 0;
      leaving_ = size();
      ++generation_;
      std::fill(here_.begin(), here_.end(), Presence::away);
      changed_.notify_all();
    } else {
      wait(lock, rank, deadline, [&] { return generation_ != generation; });
    }
    if (bytes > 0) std::memcpy(data, buffer_.data(), buffer_.size());
    if (--leaving_ == 0) changed_.notify_all();
  }

  void leave(int rank) {
    std::lock_guard lock(mutex_);
    here_[static_cast<std::size_t>(rank)] = Presence::gone;
    changed_.notify_all();
  }

 private:
  enum class Presence : char { away, waiting, gone };
  struct Verdict {
    ErrorCode code;
    int peer;
    std::string text;
  };

  /// Ends this call and all others of all ranks; under mutex_.
  [[noreturn]] void fail(int rank, const Verdict& verdict) {
    verdict_ = verdict;
    changed_.notify_all();
    throw Error(verdict.code, verdict.text, {rank, verdict.peer, Phase::bootstrap});
  }

  /// Waits for `condition`. The first rank to give up settles for all whose fault it is, so that
  /// its own leaving is not blamed for what comes after.
  template <class Condition>
  void wait(std::unique_lock<std::mutex>& lock, int rank, Deadline deadline, Condition condition) {
    const auto until = std::chrono::steady_clock::now() + deadline.remaining();
    while (!condition()) {
      const int gone = first(Presence::gone);
      if (!verdict_ && gone >= 0)
        verdict_ = {ErrorCode::peer_lost, gone, fmt::format("rank {} has left the job", gone)};
      if (!verdict_ && std::chrono::steady_clock::now() >= until) {
        const int missing = first(Presence::away);
        verdict_ = {
            ErrorCode::timeout, missing,
            fmt::format("rank {} did not come within {} ms", missing, deadline.budget().count())};
      }
      if (verdict_) fail(rank, *verdict_);
      changed_.wait_until(lock, until);
    }
  }

  int first(Presence presence) const {
    for (std::size_t i = 0; i < here_.size(); ++i)
      if (here_[i] == presence) return static_cast<int>(i);
    return -1;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<char> buffer_;
  std::vector<Presence> here_;
  int arrived_ = 0;
  int leaving_ = 0;
  std::uint64_t generation_ = 0;
  std::optional<Verdict> verdict_;
};

class InProcessBootstrap final : public Bootstrap {
 public:
  InProcessBootstrap(std::shared_ptr<Group> group, int rank)
      : group_(std::move(group)), rank_(rank) {}
  ~InProcessBootstrap() override { group_->leave(rank_); }
  int rank() const noexcept override { return rank_; }
  int size() const noexcept override { return group_->size(); }
  std::string_view kind() const noexcept override { return "in-process"; }
  void all_gather(void* data, std::size_t bytes_per_rank, Deadline deadline) override {
    group_->all_gather(rank_, static_cast<char*>(data), bytes_per_rank, deadline);
  }

 private:
  std::shared_ptr<Group> group_;
  int rank_;
};

}  // namespace

std::vector<std::shared_ptr<Bootstrap>> bootstrap_in_process(int size) {
  check_argument(size >= 1, "bootstrap_in_process: size is {}; it must be at least 1", size);
  auto group = std::make_shared<Group>(size);
  std::vector<std::shared_ptr<Bootstrap>> all;
  all.reserve(static_cast<std::size_t>(size));
  for (int rank = 0; rank < size; ++rank)
    all.push_back(std::make_shared<InProcessBootstrap>(group, rank));
  return all;
}

namespace {

/// One error is thrown; the log has what every rank said.
void log_error(std::size_t rank, const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& e) {
    log(LogLevel::info, Subsystem::boot, "thread rank {} ended with: {}", rank, e.what());
  } catch (...) {
    log(LogLevel::info, Subsystem::boot, "thread rank {} ended with something unknown", rank);
  }
}

}  // namespace

void run_in_process(int size, const std::function<void(std::shared_ptr<Bootstrap>)>& body) {
  check_argument(body != nullptr, "run_in_process: body is empty");
  auto bootstraps = bootstrap_in_process(size);
  std::vector<std::exception_ptr> errors(bootstraps.size());
  std::vector<std::thread> threads;
  for (std::size_t rank = 0; rank < bootstraps.size(); ++rank) try {
      threads.emplace_back([&, rank] {
        try {
          body(std::move(bootstraps[rank]));
        } catch (...) {
          errors[rank] = std::current_exception();
        }
      });
    } catch (const std::system_error&) {
      errors[rank] = std::current_exception();  // no thread: to the others it has left
      bootstraps[rank].reset();
    }
  for (std::thread& thread : threads) thread.join();

  for (std::size_t rank = 0; rank < errors.size(); ++rank)
    if (errors[rank]) log_error(rank, errors[rank]);
  std::exception_ptr consequence;
  for (const std::exception_ptr& error : errors) {
    if (!error) continue;
    try {
      std::rethrow_exception(error);
    } catch (const Error& e) {
      if (e.code() != ErrorCode::peer_lost) throw;
      if (!consequence) consequence = error;
    }
  }
  if (consequence) std::rethrow_exception(consequence);
}

}  // namespace expertwire
