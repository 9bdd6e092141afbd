#include "expertwire/stream.hpp"

#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <tuple>
#include <utility>

#include "base/check.hpp"
#include "base/cuda_calls.hpp"
#include "base/process.hpp"

namespace expertwire::inline v0 {

struct Queue::Impl {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> queue;
  std::exception_ptr error;
  bool busy = false;
  bool ending = false;
  OwnProcess process;
  std::thread thread;

  void run() {
    std::unique_lock lock(mutex);
    for (;;) {
      changed.wait(lock, [&] { return ending || !queue.empty(); });
      if (queue.empty()) return;
      std::function<void()> work = std::move(queue.front());
      queue.pop_front();
      busy = true;
      lock.unlock();
      std::exception_ptr caught;
      try {
        work();
      } catch (...) {
        caught = std::current_exception();
      }
      work = nullptr;
      lock.lock();
      if (caught && !error) error = caught;
      busy = false;
      changed.notify_all();
    }
  }
};

Queue::Queue() : impl_(std::make_unique<Impl>()) {
  impl_->thread = std::thread([impl = impl_.get()] { impl->run(); });
}

Queue::~Queue() {
  if (!impl_->process.here()) {  // a forked child has no such thread
    std::ignore = impl_.release();
    return;
  }
  {
    std::lock_guard lock(impl_->mutex);
    impl_->ending = true;
    impl_->changed.notify_all();
  }
  impl_->thread.join();
}

void Queue::enqueue(std::function<void()> work) {
  check_argument(work != nullptr, "Queue::enqueue: work is empty");
  std::lock_guard lock(impl_->mutex);
  impl_->queue.push_back(std::move(work));
  impl_->changed.notify_all();
}

void Queue::synchronize() {
  std::unique_lock lock(impl_->mutex);
  impl_->changed.wait(lock, [&] { return impl_->queue.empty() && !impl_->busy; });
  if (std::exception_ptr error = std::exchange(impl_->error, nullptr))
    std::rethrow_exception(error);
}

void Stream::synchronize() const {
  if (is_cuda()) return synchronize_cuda_stream(cuda_handle());
  if (Queue* queued = queue()) queued->synchronize();
}

}  // namespace expertwire
