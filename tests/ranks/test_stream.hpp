#pragma once

#include <functional>
#include <memory>

#include "expertwire/communicator.hpp"
#include "expertwire/stream.hpp"

#if defined(EXPERTWIRE_TEST_ON_CUDA)
#include "base/cuda.hpp"
#endif

namespace expertwire::test {

/// A stream of the backend that a test runs on, and work of the host in it.
class TestStream {
 public:
#if defined(EXPERTWIRE_TEST_ON_CUDA)
  explicit TestStream(const Communicator& communicator)
      : own_(make_cuda_stream(communicator.cuda_device())), stream_(Stream::cuda(own_.get())) {}
  /// `work` must not call CUDA.
  void enqueue(std::function<void()> work) {
    check_cuda(cudaLaunchHostFunc(
                   own_.get(),
                   [](void* data) {
                     const std::unique_ptr<std::function<void()>> call(
                         static_cast<std::function<void()>*>(data));
                     (*call)();
                   },
                   new std::function<void()>(std::move(work))),
               "cudaLaunchHostFunc");
  }
#else
  explicit TestStream(const Communicator&) {}
  void enqueue(std::function<void()> work) { own_->enqueue(std::move(work)); }
#endif
  Stream get() const { return stream_; }
  void synchronize() { stream_.synchronize(); }

 private:
#if defined(EXPERTWIRE_TEST_ON_CUDA)
  std::shared_ptr<CUstream_st> own_;
  Stream stream_;
#else
  std::unique_ptr<Queue> own_ = std::make_unique<Queue>();
  Stream stream_{*own_};
#endif
};

}  // namespace expertwire::test
