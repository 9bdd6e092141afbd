#include "ep/cuda/runtime/chain.hpp"

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

namespace expertwire::inline v0::ep::cuda {

StreamPlace::StreamPlace(cudaStream_t s) : stream(s) {
  cudaStreamCaptureStatus status{};
  check_cuda(cudaStreamGetCaptureInfo(stream, &status, &capture, &graph),
             "cudaStreamGetCaptureInfo");
  if (status != cudaStreamCaptureStatusActive) capture = 0;
  if (captured())
    id = reinterpret_cast<std::uintptr_t>(stream);  // it cannot be asked for, nor end meanwhile
  else
    check_cuda(cudaStreamGetId(stream, &id), "cudaStreamGetId");
}

// What graphs keep -------------------------------------------------------------------------------

namespace {

/// The end of a graph is told on a thread that must not call CUDA; what the graph kept is let go by
/// another. That thread is started with the first graph, and stays.
class Collector {
 public:
  static Collector& get() {
    static auto* collector = new Collector;  // outlives every graph
    return *collector;
  }
  void give(std::shared_ptr<void> what) {
    std::lock_guard lock(mutex_);
    given_.push_back(std::move(what));
    changed_.notify_one();
  }

 private:
  Collector() {
    std::thread([this] { run(); }).detach();
  }

  void run() {
    for (;;) {
      std::deque<std::shared_ptr<void>> now;
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return !given_.empty(); });
      now.swap(given_);
      lock.unlock();
      now.clear();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<void>> given_;
};

void CUDART_CB hand_over(void* kept) {
  auto* what = static_cast<std::shared_ptr<void>*>(kept);
  Collector::get().give(std::move(*what));
  delete what;
}

}  // namespace

void keep_with_graph(const StreamPlace& place, std::shared_ptr<void> what) {
  Collector::get();
  cudaUserObject_t object = nullptr;
  auto kept = std::make_unique<std::shared_ptr<void>>(std::move(what));
  check_cuda(
      cudaUserObjectCreate(&object, kept.get(), hand_over, 1, cudaUserObjectNoDestructorSync),
      "cudaUserObjectCreate");
  kept.release();
  const cudaError_t result =
      cudaGraphRetainUserObject(place.graph, object, 1, cudaGraphUserObjectMove);
  if (result != cudaSuccess) cudaUserObjectRelease(object, 1);
  check_cuda(result, "cudaGraphRetainUserObject");
}

// Chain ------------------------------------------------------------------------------------------

Chain::Chain(int device) : device_(device) {
  const DeviceGuard guard(device);
  check_cuda(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreate");
  check_cuda(cudaEventCreateWithFlags(&captured_event_, cudaEventDisableTiming), "cudaEventCreate");
}

Chain::~Chain() {
  const DeviceGuard guard(device_, std::nothrow);
  cudaEventDestroy(event_);
  cudaEventDestroy(captured_event_);
}

void Chain::enter(const StreamPlace& place) {
  // Between a capture and other work, or another capture, the caller keeps the order.
  const Last& last = place.captured() ? captured_ : uncaptured_;
  if (!last.used || last.capture != place.capture || last.stream == place.id) return;
  check_cuda(cudaStreamWaitEvent(place.stream, place.captured() ? captured_event_ : event_, 0),
             "cudaStreamWaitEvent");
}

void Chain::leave(const StreamPlace& place) {
  (place.captured() ? captured_ : uncaptured_) = {true, place.capture, place.id};
  check_cuda(cudaEventRecord(place.captured() ? captured_event_ : event_, place.stream),
             "cudaEventRecord");
}

bool Chain::idle() const { return cudaEventQuery(event_) != cudaErrorNotReady; }

}  // namespace expertwire::ep::cuda
