#pragma once

#include <functional>
#include <memory>

namespace expertwire {

/// A `cudaStream_t` of the caller's, without its header.
struct CudaStream {
  void* handle = nullptr;
};

/// An ordered queue of work beside the calling thread: a thread of its own for the CPU backend, or
/// a CUDA stream of the caller's for the CUDA backend.
///
/// Operations given to a stream run one after another in the order of the calls, and the call
/// returns before they have run. Operations given no stream have finished when the call returns.
class Stream {
 public:
  /// A stream of the CPU backend.
  Stream();
  /// The caller's CUDA stream, which must outlive what is queued. It may be capturing.
  explicit Stream(CudaStream stream);
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  /// CPU: finishes what is queued; an error that nobody asked for is dropped. CUDA: does nothing.
  ~Stream();

  /// CPU: queues `work`. If it throws, what is queued after it still runs, and the next
  /// synchronize() throws the first such error. Throws `Error{invalid_usage}` on a CUDA stream.
  void enqueue(std::function<void()> work);
  /// Returns when everything queued has run. CPU: throws the first error since the last call. CUDA:
  /// errors of operations show in the next call to their object, and in its status().
  void synchronize();

  bool is_cuda() const noexcept;
  /// The cudaStream_t; null for a stream of the CPU backend.
  void* cuda_handle() const noexcept;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;  // null for a CUDA stream
  CudaStream cuda_;
};

}  // namespace expertwire
