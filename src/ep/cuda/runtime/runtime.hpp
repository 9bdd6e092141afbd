#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "base/cuda.hpp"
#include "comm/watcher.hpp"
#include "ep/cuda/kernel/context.hpp"
#include "ep/cuda/runtime/device_share.hpp"
#include "ep/front/object.hpp"
#include "ep/protocol/slots.hpp"

namespace expertwire::inline v0::ep::cuda {

/// What an object of the CUDA backend needs whatever its mode: words, order, launching, failure.
/// Graphs that captured its operations keep the memory that they work in: it goes back, also at the
/// peers, when the object and all its graphs have been destroyed.
class Runtime final : private Watcher::Client {
 public:
  /// `sms` is the object's budget as asked for; 0: the rank's share.
  Runtime(Object& object, std::shared_ptr<Region> region, int lanes, int sms);
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;
  /// After drain().
  ~Runtime() override;

  DeviceShare& share() const { return *share_; }
  const std::shared_ptr<DeviceShare>& shared_share() const { return share_; }
  /// Keeps `memory`, which kernels of the object use, as long as they can run. Before the first
  /// job.
  void keep(std::shared_ptr<void> memory) { kept_->memory.push_back(std::move(memory)); }
  /// Memory of the device.
  Allocator allocator() const;

  /// What a request asks of the runtime.
  struct Job {
    int lane = 0;
    const char* operation = "";
    Stream stream = {};
    std::optional<std::chrono::milliseconds> timeout = {};
    int sms = 0;
    bool wait = true;  ///< without a stream: return when done
    /// Another lane whose memory the call reads: what that lane is given later waits for it.
    int other_lane = -1;

    template <class Request>
    static Job of(int lane, const char* operation, const Request& request) {
      return {.lane = lane,
              .operation = operation,
              .stream = request.stream,
              .timeout = request.timeout,
              .sms = request.sms};
    }
  };
  /// The caller's stream, or that of the lane.
  cudaStream_t stream_of(int lane, const Stream& stream) const;
  /// SMs that the object has.
  int sms() const { return sms_; }
  /// Blocks that work for a call, an SM each, whose wish has been checked: all SMs of its budget
  /// but the courier's.
  int workers_of(const Job& job) const { return (job.sms == 0 ? sms_ : job.sms) - couriers_; }
  /// Whether all other ranks are reached through host memory.
  bool all_staged() const {
    return couriers_ > 0 && region_->staged_peers() == object_.communicator()->size() - 1;
  }
  /// Throws `Error{invalid_argument}` if a call cannot have so many; 0: the object's.
  void check_sms(int sms) const {
    ep::check_sms(sms, sms_);
    if (sms > 0) check_sms_of_courier(sms);
  }
  Context context_of(const Job& job) const;

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
  /// The `sent` counter of a direction, once everything given to the lane and to the call's stream
  /// is done. Throws what went wrong meanwhile.
  Epoch read_epoch(const Job& job, std::uint64_t words);

  /// Runs `launch(stream)` in the order of the lane and the device. Without a stream it returns
  /// when the work is done, or throws what went wrong.
  template <class Launch>
  void run(const Job& job, Launch launch) {
    const DeviceGuard guard(share_->device());
    const StreamPlace place(stream_of(job.lane, job.stream));
    object_.note_timeout(object_.budget(job.timeout));
    {
      std::lock_guard order(share_->order());
      begin(job, place);
      launch(place.stream);
      end(job, place);
    }
    if (!job.stream.present() && job.wait) await_stream(job, place.stream);
  }
  /// Polls `done()`; throws what went wrong.
  template <class Done>
  void watch(const Job& job, Done done) {
    Patience patience(object_.wait_context(job.timeout, job.operation));
    // Kernels keep the deadline themselves; the host's comes a little later, in case one is gone.
    const Deadline late = object_.late_deadline(job.timeout);
    while (!done()) {
      throw_failure(job.operation);
      if (patience.pause() && late.expired() && !done()) give_up(job.operation, late);
    }
    throw_failure(job.operation);
  }

  /// Throws what kernels have reported, if they have.
  void throw_failure(const char* operation) const;
  /// What kernels have noticed, for status().
  void refresh(Status& status, int top_k) const;
  /// Waits for what was given to the lanes, but for what was captured; false if it did not end by
  /// the deadline, nor after kernels were told to leave.
  bool drain(Deadline deadline);

 private:
  /// What kernels of the object work in.
  struct Kept {
    std::shared_ptr<Region> region;
    std::shared_ptr<DeviceShare> share;
    std::vector<std::shared_ptr<void>> memory;
  };

  bool awaits(int peer) override;
  void lose(const Error& lost) override;

  double time_copies(const Scratch& scratch) const;
  void check_sms_of_courier(int sms) const;
  void begin(const Job& job, const StreamPlace& place);
  void end(const Job& job, const StreamPlace& place);
  void keep_for_capture(const StreamPlace& place);
  void await_stream(const Job& job, cudaStream_t stream);
  bool idle_by(Deadline deadline) const;
  /// What kernels reported, as an error of `operation`.
  Error reported(const char* operation) const;
  std::string describe_failure(const char* operation) const;
  [[noreturn]] void give_up(const char* operation, const Deadline& deadline);

  Object& object_;
  std::shared_ptr<Region> region_;
  std::shared_ptr<DeviceShare> share_;
  std::shared_ptr<Kept> kept_;
  unsigned long long kept_for_ = 0;  // the last capture that keeps it
  HostWords* words_;
  KernelWords* kernel_words_;
  Notices* notices_;  // pinned: the last that were asked for
  mutable std::mutex mutex_;
  std::optional<Error> lost_;  // guarded by mutex_
  int couriers_;               // blocks of a launch behind those that work
  int sms_;
  // By lane.
  std::vector<std::unique_ptr<Chain>> chains_;
  std::vector<std::shared_ptr<CUstream_st>> streams_;  // for calls without one
  std::vector<Context> contexts_;                      // what is the same in all calls
};

/// What the CUDA backend cannot do, said before anything is made.
void check_limits(const Object& object, const MoeShape& shape);

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
