#pragma once

#include <memory>

#include "base/cuda.hpp"

namespace expertwire::inline v0::ep::cuda {

/// A stream, and the capture that it is part of, asked once a call.
struct StreamPlace {
  explicit StreamPlace(cudaStream_t s);
  bool captured() const { return capture != 0; }

  cudaStream_t stream;
  /// Of this stream alone: the handle of one that has been destroyed may be another's now, and the
  /// default stream of each thread has the same.
  unsigned long long id = 0;
  unsigned long long capture = 0;  ///< 0: none
  cudaGraph_t graph = nullptr;     ///< that is being captured
};

/// Keeps `what` until the graph that is being captured, and everything that is made of it, has been
/// destroyed and runs no more. What is kept is let go by a thread of the library.
void keep_with_graph(const StreamPlace& place, std::shared_ptr<void> what);

/// Work that must run in the order of the calls although it may come from several streams: one
/// event between a stream and the next. Within a capture, the order of the calls is captured;
/// between a capture and other work the caller keeps it. Not for several threads at once.
class Chain {
 public:
  explicit Chain(int device);
  Chain(const Chain&) = delete;
  Chain& operator=(const Chain&) = delete;
  ~Chain();

  /// Before work is given to `stream`.
  void enter(const StreamPlace& place);
  /// After it.
  void leave(const StreamPlace& place);
  /// Whether the last work that was not captured has run.
  bool idle() const;

 private:
  /// The last work of one kind.
  struct Last {
    bool used = false;
    unsigned long long capture = 0;
    unsigned long long stream = 0;
  };

  int device_;
  cudaEvent_t event_ = nullptr, captured_event_ = nullptr;
  Last uncaptured_, captured_;
};

}  // namespace expertwire::ep::cuda
