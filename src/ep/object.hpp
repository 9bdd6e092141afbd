#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "comm/wait.hpp"
#include "ep/region.hpp"
#include "ep/route.hpp"
#include "expertwire/allocator.hpp"
#include "expertwire/status.hpp"
#include "expertwire/stream.hpp"
#include "expertwire/tensor.hpp"

namespace expertwire::ep {

/// What a handle of either mode has.
struct HandleState {
  std::uint64_t object = 0;  ///< id of the object that made it
  int lane = 0;
  int tokens = 0;            ///< T of the dispatch
  Route route;               ///< CPU backend: set once the dispatch runs
  std::weak_ptr<void> held;  ///< expires when no caller has a handle any more

  HandleState() = default;
  HandleState(const HandleState&) = delete;
  HandleState& operator=(const HandleState&) = delete;
  virtual ~HandleState() = default;
};

/// Lets operations of one lane run one after another in the order in which they were called, also
/// when they come from several streams.
class Turnstile {
 public:
  /// Called by the caller, in call order.
  std::uint64_t draw() { return next_++; }
  /// Called where the operation runs; blocks until all earlier ones have left.
  void enter(std::uint64_t ticket);
  void leave();
  /// Returns when everything that was called has run; each of it ends by its deadline.
  void drain() {
    enter(draw());
    leave();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t next_ = 0;     // of the calling thread
  std::uint64_t current_ = 0;  // guarded by mutex_
};

/// A turn at a lane, given up at the end of the scope, however it ends.
class Turn {
 public:
  Turn(Turnstile& turnstile, std::uint64_t ticket) : turnstile_(turnstile) {
    turnstile_.enter(ticket);
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  ~Turn() { turnstile_.leave(); }

 private:
  Turnstile& turnstile_;
};

/// State and habits that both modes share: identity, failure, patience, streams, outputs.
class Object {
 public:
  Object(std::shared_ptr<Communicator> communicator, const char* name);

  std::uint64_t id() const { return id_; }
  const std::shared_ptr<Communicator>& communicator() const { return communicator_; }

  /// Throws `Error{failed_earlier}` if an operation of this object has failed.
  void check_usable() const;
  /// The first failure stays; later calls throw it.
  void fail(const std::string& message);
  /// Remembers ids that were out of range.
  void note_invalid_ids(const Route& route, const ExpertIds& ids);
  void note_dropped_rows(std::int64_t rows);
  Status status() const;

  WaitContext wait_context(std::optional<std::chrono::milliseconds> timeout,
                           const char* operation) const;

  /// Runs `work` in its turn at the lane, on the stream, or now if there is none. If it throws, the
  /// object has failed, and what is queued behind it leaves at once.
  void execute(Stream* stream, Turnstile& turnstile, std::function<void()> work);

  /// The handle if it is one of this object; throws `Error{invalid_usage}` otherwise.
  template <class State>
  std::shared_ptr<State> own_handle(const std::shared_ptr<HandleState>& state) const {
    check_handle(state.get());
    return std::static_pointer_cast<State>(state);
  }

 private:
  void check_handle(const HandleState* state) const;

  std::shared_ptr<Communicator> communicator_;
  const char* name_;
  std::uint64_t id_;
  int spins_;
  mutable std::mutex mutex_;
  Status status_;
};

/// Throws `Error{mismatch}` if a peer sends rows of another dtype than this rank.
void check_same_format(DType theirs, DType ours, const ErrorContext& where);

/// Throws `Error{invalid_argument}` unless `sms`, of a call, is from 0 to `most`.
void check_sms(int sms, int most);

/// Threads that one lane of this rank should work with: `asked`, else what the environment says,
/// else cores over ranks of this host.
int team_size(const Communicator& communicator, int asked);

/// Gives outputs that the caller left absent, and keeps them alive together.
class OutputMaker {
 public:
  explicit OutputMaker(const Allocator& allocator) : allocator_(allocator) {}
  TensorView make(std::string_view name, DType dtype, std::initializer_list<std::int64_t> shape);
  /// Owns everything made so far.
  std::shared_ptr<void> owner() const { return owners_; }

 private:
  const Allocator& allocator_;
  std::shared_ptr<std::vector<std::shared_ptr<void>>> owners_ =
      std::make_shared<std::vector<std::shared_ptr<void>>>();
};

}  // namespace expertwire::ep
