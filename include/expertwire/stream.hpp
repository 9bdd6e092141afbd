#pragma once

#include <functional>
#include <memory>

namespace expertwire {

/// An ordered queue of work beside the calling thread; the CPU backend's counterpart of a CUDA
/// stream.
///
/// Operations given to a stream run on its thread, one after another in the order of the calls, and
/// the call returns before they have run. Operations given no stream run on the calling thread and
/// have finished when the call returns.
class Stream {
 public:
  Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  /// Finishes what is queued. An error that nobody asked for is dropped.
  ~Stream();

  /// Queues `work`. If it throws, what is queued after it still runs, and the next synchronize()
  /// throws the first such error.
  void enqueue(std::function<void()> work);
  /// Returns when everything queued has run; throws the first error since the last call.
  void synchronize();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace expertwire
