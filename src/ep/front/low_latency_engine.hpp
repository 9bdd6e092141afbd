#pragma once

#include <deque>
#include <memory>
#include <optional>

#include "ep/front/object.hpp"
#include "ep/protocol/row_format.hpp"
#include "ep/protocol/slots.hpp"
#include "expertwire/low_latency.hpp"

namespace expertwire::inline v0::ep {

struct LowLatencyHandle;

/// Operations whose arguments have been checked: the caller's request as it is, and what has been
/// made of it.
struct LowLatencyDispatch {
  LowLatency::DispatchRequest request;
  RowFormat format;  ///< of the rows that travel
  LowLatency::Outputs outputs;
  std::shared_ptr<LowLatencyHandle> handle;
  std::shared_ptr<void> owner;  ///< kept until the operation has run
};
struct LowLatencyCombine {
  LowLatency::CombineRequest request;  ///< without its handle
  TensorView out;
  std::shared_ptr<LowLatencyHandle> handle;
  std::shared_ptr<void> owner;
};

/// An operation that has sent only, with its number in its lane and direction. It does not own its
/// handle, in which it lies.
template <class Operation>
struct OpenHalf {
  std::uint64_t number;
  Operation operation;

  OpenHalf(std::uint64_t n, const Operation& whole) : number(n), operation(whole) {
    operation.handle = nullptr;
  }
};

/// Routing of one low-latency dispatch; each backend adds what it needs.
struct LowLatencyHandle : HandleState {
  bool weighted = false;  ///< weights came with dispatch
  // Of the calling thread: receive halves that have not been called.
  std::optional<OpenHalf<LowLatencyDispatch>> open_dispatch;
  std::deque<OpenHalf<LowLatencyCombine>> open_combines;
};

/// Which halves of an operation a call gives to its lane.
enum class Half : std::uint8_t { send, receive, both };

/// What the low-latency mode asks of a backend: operations whose arguments have been checked, in an
/// order that the lane allows.
class LowLatencyEngine {
 public:
  LowLatencyEngine() = default;
  LowLatencyEngine(const LowLatencyEngine&) = delete;
  LowLatencyEngine& operator=(const LowLatencyEngine&) = delete;
  /// After drain().
  virtual ~LowLatencyEngine() = default;
  /// Waits for what was called; false if it did not end by the deadline.
  virtual bool drain(Deadline deadline) = 0;

  using Dispatch = LowLatencyDispatch;
  using Combine = LowLatencyCombine;

  /// A handle for a dispatch on `lane`, in memory of the request's allocator.
  virtual std::shared_ptr<LowLatencyHandle> make_handle(
      int lane, const LowLatency::DispatchRequest& request) = 0;
  virtual void dispatch(const Dispatch& work, Half half) = 0;
  virtual void combine(const Combine& work, Half half) = 0;
  /// Adds what the backend has noticed.
  virtual void refresh(Status&) const {}
  /// Where outputs come from when a request names no allocator.
  virtual Allocator default_allocator() const = 0;
  /// Throws `Error{invalid_argument}` for a budget that a call cannot have; asked before anything
  /// is sent.
  virtual void check_sms(int sms) const { ep::check_sms(sms, INT32_MAX); }
};

/// Collective.
std::unique_ptr<LowLatencyEngine> make_cpu_engine(Object& object, const LowLatencyOptions& options);
/// Throws `Error{unsupported}` in builds without CUDA.
std::unique_ptr<LowLatencyEngine> make_cuda_engine(Object& object,
                                                   const LowLatencyOptions& options);

/// The layout of a lane.
LowLatencySlots low_latency_slots(const LowLatencyOptions& options, int ranks);

/// Makes the arena's part for all lanes. Collective.
std::shared_ptr<Region> make_region(const Object& object, const LowLatencyOptions& options);

}  // namespace expertwire::ep
