#include "ep/cpu/team.hpp"

#include <system_error>

#include "base/check.hpp"

namespace expertwire::inline v0::ep::cpu {

Team::Team(int workers) {
  try {
    for (int worker = 1; worker < workers; ++worker)
      threads_.emplace_back([this, worker] { serve(worker); });
  } catch (const std::system_error& error) {
    end();
    throw Error(ErrorCode::system,
                fmt::format("cannot start {} threads for a lane ({}); lower EXPERTWIRE_THREADS or "
                            "the limit on processes is too low",
                            workers - 1, error.what()));
  }
}

Team::~Team() { end(); }

void Team::end() {
  ending_ = true;
  generation_.fetch_add(1);
  generation_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

void Team::call(int worker) noexcept {
  try {
    (*body_)(worker);
  } catch (...) {
    std::lock_guard lock(mutex_);
    if (!error_) error_ = std::current_exception();
    failed_ = true;
  }
}

void Team::serve(int worker) {
  for (std::uint32_t seen = 0;;) {
    generation_.wait(seen);
    seen = generation_.load();
    if (ending_) return;
    call(worker);
    if (running_.fetch_sub(1) == 1) running_.notify_one();
  }
}

void Team::run(const std::function<void(int)>& body) {
  body_ = &body;
  error_ = nullptr;
  failed_ = false;
  running_ = static_cast<int>(threads_.size());
  if (!threads_.empty()) {
    generation_.fetch_add(1);
    generation_.notify_all();
  }
  call(0);
  for (int left = running_; left != 0; left = running_) running_.wait(left);
  if (error_) std::rethrow_exception(error_);
}

}  // namespace expertwire::ep::cpu
