#include "expertwire/stream.hpp"

#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <tuple>
#include <utility>

#include "base/check.hpp"
#include "base/cuda_stream.hpp"
#include "base/process.hpp"

namespace expertwire {

struct Stream::Impl {
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

Stream::Stream() : impl_(std::make_unique<Impl>()) {
  impl_->thread = std::thread([impl = impl_.get()] { impl->run(); });
}

Stream::Stream(CudaStream stream) : cuda_(stream) {}

bool Stream::is_cuda() const noexcept { return impl_ == nullptr; }
void* Stream::cuda_handle() const noexcept { return cuda_.handle; }

Stream::~Stream() {
  if (is_cuda()) return;
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

void Stream::enqueue(std::function<void()> work) {
  check_argument(work != nullptr, "Stream::enqueue: work is empty");
  check(!is_cuda(), ErrorCode::invalid_usage,
        "host work was given to a CUDA stream; the CPU backend takes a Stream made without one");
  std::lock_guard lock(impl_->mutex);
  impl_->queue.push_back(std::move(work));
  impl_->changed.notify_all();
}

void Stream::synchronize() {
  if (is_cuda()) return synchronize_cuda_stream(cuda_.handle);
  std::unique_lock lock(impl_->mutex);
  impl_->changed.wait(lock, [&] { return impl_->queue.empty() && !impl_->busy; });
  if (std::exception_ptr error = std::exchange(impl_->error, nullptr))
    std::rethrow_exception(error);
}

}  // namespace expertwire
