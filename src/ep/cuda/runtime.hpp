#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "base/cuda.hpp"
#include "ep/cuda/context.hpp"
#include "ep/object.hpp"
#include "ep/slots.hpp"

namespace expertwire::ep::cuda {

/// The id of the capture that `stream` is part of, or 0.
unsigned long long capture_of(cudaStream_t stream);

/// A stream, and the capture that it is part of, asked once a call.
struct StreamPlace {
  explicit StreamPlace(cudaStream_t s) : stream(s), capture(capture_of(s)) {}
  bool captured() const { return capture != 0; }

  cudaStream_t stream;
  unsigned long long capture;
};

/// Work that must run in the order of the calls although it may come from several streams: one
/// event between a stream and the next. Within a capture, the order of the calls is captured;
/// between a capture and other work the caller keeps it.
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
  /// Waits on the host for the last work that was not captured.
  void drain() noexcept;

 private:
  /// The last work of one kind.
  struct Last {
    bool used = false;
    unsigned long long capture = 0;
    cudaStream_t stream = nullptr;
  };

  int device_;
  cudaEvent_t event_ = nullptr, captured_event_ = nullptr;
  Last uncaptured_, captured_;
};

/// A rank's share of its device, common to all objects of a communicator. Kernels that wait for
/// peers must be resident at the same time as those they wait for. If all lanes' kernels fit side
/// by side they run as they come; otherwise in the order of the calls, which is the same on all
/// ranks.
class DeviceShare {
 public:
  static std::shared_ptr<DeviceShare> of(const std::shared_ptr<Communicator>& communicator);
  explicit DeviceShare(const Communicator& communicator);

  /// Whether the device has a bulk copy engine (Hopper and later) and kernels are to use it.
  bool bulk_copies() const { return bulk_copies_; }
  /// Shared memory that a block may have beside what a kernel takes by itself.
  std::uint32_t shared_bytes() const { return shared_bytes_; }
  /// SMs of the device over the ranks that share it.
  int sms() const { return sms_; }
  int device() const { return device_; }
  /// A stream of this rank's own, for calls without one.
  cudaStream_t stream() const { return stream_.get(); }
  /// A stream on which memory is taken and given back; kernels never run there.
  const std::shared_ptr<CUstream_st>& memory_stream() const { return memory_stream_; }

  /// What this GPU writes to a peer, in bytes a microsecond; 0 before it has been measured.
  double link_bytes_per_us = 0;

  /// A lane says how many SMs it uses at most.
  void join(int sms);
  void leave(int sms);
  void enter_order(const StreamPlace& place);
  void leave_order(const StreamPlace& place);

 private:
  int device_;
  int sms_;
  bool bulk_copies_;
  std::uint32_t shared_bytes_;
  std::shared_ptr<CUstream_st> stream_, memory_stream_;
  std::mutex mutex_;
  int joined_ = 0;
  Chain order_;
};

/// Blocks of device memory of one size, for the routing of handles. Those that a capture uses stay
/// with it until the object ends; others are used again, in the order of their lane.
class BlockPool : public std::enable_shared_from_this<BlockPool> {
 public:
  BlockPool(std::shared_ptr<DeviceShare> share, std::size_t bytes, int count);
  /// For a call that is `captured` into a graph, or is not.
  std::shared_ptr<std::byte> take(bool captured);
  std::size_t bytes() const { return bytes_; }

 private:
  void add(int count);

  std::shared_ptr<DeviceShare> share_;
  std::size_t bytes_;
  std::mutex mutex_;
  std::vector<std::shared_ptr<void>> owned_;
  std::vector<std::byte*> free_;
};

/// What an object of the CUDA backend needs whatever its mode: failure words, order, launching.
class Runtime {
 public:
  /// `sms` is the object's budget as asked for; 0: the rank's share.
  Runtime(Object& object, std::shared_ptr<Region> region, int lanes, int sms);
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;
  ~Runtime();

  DeviceShare& share() const { return *share_; }
  const std::shared_ptr<DeviceShare>& shared_share() const { return share_; }
  HostWords& words() const { return *words_; }
  const Allocator& allocator() const { return allocator_; }

  struct Call {
    int lane = 0;
    Stream* stream = nullptr;
    std::optional<std::chrono::milliseconds> timeout;
    int sms = 0;
    const char* operation = "";
    bool wait = true;  ///< without a stream: return when done
    /// Another lane whose memory the call reads: what that lane is given later waits for it.
    int other_lane = -1;
  };
  cudaStream_t stream_of(const Call& call) const;
  /// SMs that the object has.
  int sms() const { return sms_; }
  /// SMs for a call, whose wish has been checked.
  int budget_of(const Call& call) const { return call.sms == 0 ? sms_ : call.sms; }
  Context context_of(const Call& call) const;

  /// Memory at the same place of lane 0 of every rank that holds nothing yet.
  struct Scratch {
    std::uint64_t offset;
    std::size_t bytes;
  };
  /// The speed of the links, in bytes a microsecond: what EXPERTWIRE_LINK_GBPS says, else what was
  /// measured when one of the communicator's objects was made, else measured now, if there is
  /// enough memory for it. Collective; all ranks have the same scratch.
  double measure_links(const Scratch& scratch);

  /// This rank's part of a lane.
  std::byte* lane_base(int lane) const;
  /// The `sent` counter of a direction, once everything given to the lane is done.
  Epoch read_epoch(int lane, std::uint64_t words) const;

  /// Runs `launch(stream)` in the order of the lane and the device. Without a stream it returns
  /// when the work is done, or throws what went wrong.
  template <class Launch>
  void run(const Call& call, Launch launch) {
    const DeviceGuard guard(share_->device());
    const StreamPlace place(stream_of(call));
    begin(call, place);
    launch(place.stream);
    end(call, place);
  }
  /// Polls `done()` while looking after peers and failures; throws what went wrong.
  template <class Done>
  void watch(const Call& call, Done done) {
    const WaitContext context = object_.wait_context(call.timeout, call.operation);
    Patience patience(context);
    // Kernels keep the deadline themselves; the host's comes a little later, in case one is gone.
    const Deadline late =
        Deadline::after(context.deadline.budget() + std::chrono::milliseconds(1000));
    while (!done()) {
      throw_failure(call.operation);
      if (!patience.pause()) continue;
      look_for_lost_peer(call.operation);
      if (late.expired() && !done()) give_up(call.operation, late);
    }
    throw_failure(call.operation);
  }

  /// Throws what kernels have reported, if they have.
  void throw_failure(const char* operation) const;
  /// What kernels have noticed, for status().
  void refresh(Status& status, int top_k) const;
  /// Waits for everything that was given to the lanes.
  void drain() noexcept;

 private:
  double time_copies(const Scratch& scratch) const;
  void begin(const Call& call, const StreamPlace& place);
  void end(const Call& call, const StreamPlace& place);
  void look_for_lost_peer(const char* operation);
  [[noreturn]] void give_up(const char* operation, const Deadline& deadline);

  Object& object_;
  std::shared_ptr<Region> region_;
  std::shared_ptr<DeviceShare> share_;
  std::shared_ptr<void> words_memory_, failure_memory_;
  HostWords* words_;
  FailureWords* failure_;
  Allocator allocator_;
  int sms_;
  std::vector<std::unique_ptr<Chain>> chains_;  // by lane
  std::vector<Context> contexts_;               // by lane; what is the same in all calls
};

/// What the CUDA backend cannot do, said before anything is made.
void check_limits(const Object& object, const MoeShape& shape, int handles);

/// Places arrays one behind the other in a block of device memory.
class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  template <class T>
  T* take(std::size_t count) {
    auto* result = reinterpret_cast<T*>(base_ + placer_.take(count * sizeof(T)));
    return result;
  }
  std::size_t bytes() const { return placer_.bytes(); }

 private:
  std::byte* base_;
  Placer placer_;
};

}  // namespace expertwire::ep::cuda
