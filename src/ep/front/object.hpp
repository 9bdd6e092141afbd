#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "base/process.hpp"
#include "comm/wait.hpp"
#include "ep/front/region.hpp"
#include "ep/front/route.hpp"
#include "ep/protocol/call.hpp"
#include "expertwire/allocator.hpp"
#include "expertwire/handle.hpp"
#include "expertwire/status.hpp"
#include "expertwire/stream.hpp"
#include "expertwire/tensor.hpp"

namespace expertwire::inline v0::ep {

/// What a handle of either mode has.
struct HandleState {
  std::uint64_t object = 0;  ///< id of the object that made it
  int lane = 0;
  int tokens = 0;            ///< T of the dispatch
  MoeShape shape;            ///< of the dispatch: its H, dtype, E, K and M
  Route route;               ///< CPU backend: set once the dispatch runs
  std::weak_ptr<void> held;  ///< expires when no caller has a handle any more

  HandleState() = default;
  HandleState(const HandleState&) = delete;
  HandleState& operator=(const HandleState&) = delete;
  virtual ~HandleState() = default;

  /// What an operation with this handle says about itself; `format` is that of its rows.
  Call call(std::int32_t options, const RowFormat& format) const {
    return {options | (tokens == 0 ? Call::kNoTokens : 0),
            format.word(),
            lane,
            shape.hidden,
            shape.top_k,
            shape.experts,
            shape.max_tokens};
  }
};

/// What only the library sees of a handle.
struct HandleAccess {
  static Handle make(std::shared_ptr<HandleState> state) { return Handle(std::move(state)); }
  static const std::shared_ptr<HandleState>& state(const Handle& handle) { return handle.state_; }
};

/// Lets operations of one lane run one after another in the order in which they were called, also
/// when they come from several streams.
class Turnstile {
 public:
  /// Called in call order.
  std::uint64_t draw();
  /// Called where the operation runs; returns when all earlier ones have left, or false at the
  /// deadline.
  bool enter(std::uint64_t ticket, Deadline deadline);
  /// An operation ends, or will never run.
  void leave(std::uint64_t ticket);
  /// Returns true when everything that was called has run, or false at the deadline.
  bool drain(Deadline deadline);

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t next_ = 0;
  std::uint64_t current_ = 0;
  std::set<std::uint64_t> left_early_;  // above current_
};

/// A turn at a lane, drawn when it is made and given up when it is gone, however that comes.
class Turn {
 public:
  explicit Turn(Turnstile& turnstile) : turnstile_(turnstile), ticket_(turnstile.draw()) {}
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  ~Turn() { turnstile_.leave(ticket_); }

  bool enter(Deadline deadline) { return turnstile_.enter(ticket_, deadline); }

 private:
  Turnstile& turnstile_;
  std::uint64_t ticket_;
};

/// State and habits that both modes share: identity, failure, patience, streams, outputs.
class Object {
 public:
  Object(std::shared_ptr<Communicator> communicator, const char* name);

  std::uint64_t id() const { return id_; }
  const std::shared_ptr<Communicator>& communicator() const { return communicator_; }

  /// Throws `Error{failed_earlier}` if an operation of this object has failed, and
  /// `Error{invalid_usage}` in a forked child of the process that made it.
  void check_usable() const;
  /// The first failure stays; later calls throw it.
  void fail(const Error& error);
  /// Remembers ids that were out of range.
  void note_invalid_ids(const Route& route, const ExpertIds& ids);
  void note_dropped_rows(std::int64_t rows);
  Status status() const;
  /// Says that memory stays because queued work has not ended.
  void note_leak() const noexcept;

  bool of_this_process() const { return process_.here(); }

  /// The deadline of an operation.
  std::chrono::milliseconds budget(std::optional<std::chrono::milliseconds> timeout) const {
    return timeout.value_or(communicator_->timeout());
  }
  /// The deadline for what the host waits for beside an operation, which has one itself: somewhat
  /// later, so that the operation's own error, which says more, comes first.
  Deadline late_deadline(std::optional<std::chrono::milliseconds> timeout) const {
    return Deadline::after(budget(timeout) + std::chrono::milliseconds(1000));
  }
  void note_timeout(std::chrono::milliseconds timeout) const;
  /// By when everything that was called must have ended.
  Deadline end_of_all() const;

  WaitContext wait_context(std::optional<std::chrono::milliseconds> timeout,
                           const char* operation) const;

  /// Runs `work` in its turn at the lane, on the stream, or now if there is none; its deadline
  /// begins with its turn. If it throws, the object has failed, and what is queued behind it leaves
  /// at once. So it has if the turn does not come before the deadline.
  struct Execution {
    const char* operation;
    Stream stream;
    std::optional<std::chrono::milliseconds> timeout;
  };
  void execute(const Execution& how, Turnstile& turnstile,
               std::function<void(const WaitContext&)> work);

  /// The handle if it is one of this object; throws `Error{invalid_usage}` otherwise.
  template <class State>
  std::shared_ptr<State> own_handle(const Handle& handle) const {
    const std::shared_ptr<HandleState>& state = HandleAccess::state(handle);
    check_handle(state.get());
    return std::static_pointer_cast<State>(state);
  }

 private:
  void check_handle(const HandleState* state) const;

  std::shared_ptr<Communicator> communicator_;
  const char* name_;
  std::uint64_t id_;
  int spins_;
  OwnProcess process_;
  mutable std::mutex mutex_;
  Status status_;
  mutable std::chrono::milliseconds longest_{0};  // deadline that was asked for
};

/// Never gives `what` back: something that cannot be waited for may still come to it.
void keep_for_ever(std::shared_ptr<void> what) noexcept;

/// The end of an object of either mode, `impl`. It waits for what was called. If that does not end
/// (a stream is held up by something else), or in a forked child, where nothing of it runs, its
/// memory stays.
template <class Impl>
void let_go(std::unique_ptr<Impl> impl) noexcept {
  if (impl == nullptr) return;
  const bool here = impl->object.of_this_process();
  if (here && impl->engine->drain(impl->object.end_of_all())) return;
  if (here) impl->object.note_leak();
  keep_for_ever(std::move(impl));
}

/// Throws `Error{invalid_argument}` unless `sms`, of a call, is from 0 to `most`.
void check_sms(int sms, int most);

/// Threads that one lane of this rank should work with: `asked`, else what the environment says,
/// else cores over ranks of this host.
int team_size(const Communicator& communicator, int asked);

/// Host memory.
Allocator host_allocator();

/// Gives outputs that the caller left absent, and keeps them alive together.
class OutputMaker {
 public:
  explicit OutputMaker(Allocator allocator) : allocator_(allocator) {}
  TensorView make(std::string_view name, DType dtype, std::initializer_list<std::int64_t> shape);
  /// Owns everything made so far.
  std::shared_ptr<void> owner() const { return owners_; }

 private:
  Allocator allocator_;
  std::shared_ptr<std::vector<std::shared_ptr<void>>> owners_ =
      std::make_shared<std::vector<std::shared_ptr<void>>>();
};

}  // namespace expertwire::ep
