#pragma once

#include <functional>
#include <memory>

namespace expertwire::inline v0 {

/// A queue of work beside the calling thread, run by a thread of its own: the CPU backend's stream.
class Queue {
 public:
  Queue();
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;
  /// Finishes what is queued; an error that nobody asked for is dropped.
  ~Queue();

  /// Queues `work`. If it throws, what is queued after it still runs, and the next synchronize()
  /// throws the first such error.
  void enqueue(std::function<void()> work);
  /// Returns when everything queued has run; throws the first error since the last call.
  void synchronize();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Where operations are queued: a Queue (CPU backend), or a CUDA stream of the caller's (CUDA
/// backend); default-made: nowhere. A value that owns nothing: the queue or the CUDA stream must
/// outlive what is queued.
///
/// Operations given to a stream run one after another in the order of the calls, and the call
/// returns before they have run. Operations given none have finished when the call returns.
class Stream {
 public:
  Stream() = default;
  // NOLINTNEXTLINE(google-explicit-constructor)
  Stream(Queue& queue) : kind_(Kind::queue), target_(&queue) {}
  /// A `cudaStream_t`, null for the default stream. It may be capturing.
  static Stream cuda(void* stream) {
    Stream result;
    result.kind_ = Kind::cuda;
    result.target_ = stream;
    return result;
  }

  bool present() const noexcept { return kind_ != Kind::none; }
  bool is_cuda() const noexcept { return kind_ == Kind::cuda; }
  /// The cudaStream_t; null unless is_cuda().
  void* cuda_handle() const noexcept { return is_cuda() ? target_ : nullptr; }
  /// Null unless this is a queue.
  Queue* queue() const noexcept {
    return kind_ == Kind::queue ? static_cast<Queue*>(target_) : nullptr;
  }
  /// Returns when everything queued has run. Of a queue it throws the first error since the last
  /// call; on CUDA, errors of operations show in the next call to their object, and in its
  /// status().
  void synchronize() const;

 private:
  enum class Kind { none, queue, cuda };
  Kind kind_ = Kind::none;
  void* target_ = nullptr;
};

}  // namespace expertwire
