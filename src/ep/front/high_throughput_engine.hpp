#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "ep/front/object.hpp"
#include "ep/protocol/row_format.hpp"
#include "ep/protocol/slots.hpp"
#include "expertwire/high_throughput.hpp"

namespace expertwire::inline v0::ep {

/// Routing of one high-throughput dispatch; each backend adds what it needs. These are of the
/// calling thread.
struct HighThroughputHandle : HandleState {
  std::int64_t room = 0;  ///< rows that the output of the dispatch with this routing has room for
  bool in_pool = false;   ///< the rows stay in the pool until they are released
  bool grouped = false;   ///< rows are expert-major, ...
  int alignment = 1;      ///< and groups are multiples of this
  RowFormat format;       ///< of its rows
  bool release_called = false;   ///< combine or release is on its way
  std::int64_t output_rows = 0;  ///< N of the outputs

  // Set once the host knows the counts: after an eager plan().
  std::int32_t needed = 0;  ///< rows that came, or would have
  bool overflow = false;    ///< some rank's pool is too small: nothing is sent
  std::vector<std::int32_t> rows_per_source, rows_per_expert;
};

/// What the high-throughput mode asks of a backend: operations whose arguments have been checked.
class HighThroughputEngine {
 public:
  using HandlePointer = std::shared_ptr<HighThroughputHandle>;

  HighThroughputEngine() = default;
  HighThroughputEngine(const HighThroughputEngine&) = delete;
  HighThroughputEngine& operator=(const HighThroughputEngine&) = delete;
  /// After drain().
  virtual ~HighThroughputEngine() = default;
  /// Waits for what was called; false if it did not end by the deadline.
  virtual bool drain(Deadline deadline) = 0;

  /// Operations whose arguments have been checked: the caller's request as it is, and what has been
  /// made of it.
  struct Dispatch {
    HighThroughput::DispatchRequest request;  ///< without its handle
    HandlePointer handle;
    HandlePointer cached;             ///< whose routing is taken, or null
    HighThroughput::Outputs outputs;  ///< present unless the rows stay in the pool
    std::shared_ptr<void> owner;      ///< kept until the operation has run

    /// The caller knows neither rows nor counts: plan() waits for them.
    bool eager() const { return !request.capacity && cached == nullptr; }
    /// What all ranks must have in common.
    std::int32_t call_options() const {
      const bool capacity = !cached && !eager();
      return (cached ? Call::kCached : 0) | (capacity ? Call::kCapacity : 0) |
             (handle->in_pool ? Call::kPool : 0) | (handle->grouped ? Call::kGrouped : 0);
    }
  };
  struct Combine {
    HighThroughput::CombineRequest request;  ///< without its handle
    HandlePointer handle;
    TensorView out, out_topk_weights;
    std::shared_ptr<void> owner;
  };

  /// A handle for the next dispatch of `lane`, in memory of the request's allocator.
  virtual HandlePointer make_handle(int lane, const HandlePointer& cached,
                                    const HighThroughput::DispatchRequest& request) = 0;
  /// First part of a dispatch: ranks tell each other their counts, or the cached ones are taken.
  /// Eager: returns when the host knows them. Outputs may be absent.
  virtual void plan(const Dispatch& work) = 0;
  /// Second part: rows. Ends the dispatch, also when there was an overflow.
  virtual void dispatch(const Dispatch& work) = 0;
  virtual void combine(const Combine& work) = 0;
  /// Gives the rows of a pool dispatch back to the senders.
  virtual void release(const HandlePointer& handle, const Stream& stream) = 0;

  /// The pool rows that a dispatch fills; once it has been planned.
  virtual HighThroughput::Outputs pool_view(const HighThroughputHandle& handle,
                                            std::int64_t rows) const = 0;
  /// int32 [1], valid with the handle.
  virtual TensorView needed_rows(HighThroughputHandle& handle) const = 0;
  /// int32 [R + 1] and, of a grouped handle, twice [L + 1]; as valid.
  struct Offsets {
    TensorView sources, experts, groups;
  };
  virtual Offsets offsets(HighThroughputHandle& handle) const = 0;
  /// Fills the handle's counts after a dispatch without a stream.
  virtual void learn_counts(HighThroughputHandle& handle) const = 0;
  virtual void refresh(Status&) const {}
  virtual Allocator default_allocator() const = 0;
  /// Throws `Error{invalid_argument}` for a budget that a call cannot have; asked before anything
  /// is sent.
  virtual void check_sms(int sms) const { ep::check_sms(sms, INT32_MAX); }
  /// Whether `stream` is being captured into a graph.
  virtual bool captures(const Stream&) const { return false; }
};

/// Collective.
std::unique_ptr<HighThroughputEngine> make_cpu_engine(Object& object,
                                                      const HighThroughputOptions& options);
std::unique_ptr<HighThroughputEngine> make_cuda_engine(Object& object,
                                                       const HighThroughputOptions& options);

HighThroughputSlots high_throughput_slots(const HighThroughputOptions& options, int ranks);
/// The options with all that was left open filled in: bounds, rows of the pool, frames.
HighThroughputOptions completed(const HighThroughputOptions& options, int ranks);
/// Makes the arena's part for all lanes. Collective.
std::shared_ptr<Region> make_region(const Object& object, const HighThroughputOptions& options);

}  // namespace expertwire::ep
