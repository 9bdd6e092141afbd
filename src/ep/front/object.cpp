#include "ep/front/object.hpp"

#include <algorithm>
#include <atomic>
#include <vector>

#include "base/check.hpp"
#include "base/env.hpp"
#include "base/log.hpp"

namespace expertwire::inline v0 {

Handle::Handle(std::shared_ptr<ep::HandleState> state)
    : state_(std::move(state)), held_(std::make_shared<char>()) {
  state_->held = held_;
}

namespace ep {

namespace {

constexpr int kSpinsOfOwnCore = 2000;

std::uint64_t next_object_id() {
  static std::atomic<std::uint64_t> last{0};
  return ++last;
}

}  // namespace

std::uint64_t Turnstile::draw() {
  std::lock_guard lock(mutex_);
  return next_++;
}

bool Turnstile::enter(std::uint64_t ticket, Deadline deadline) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, deadline.remaining(), [&] { return current_ == ticket; });
}

void Turnstile::leave(std::uint64_t ticket) {
  std::lock_guard lock(mutex_);
  left_early_.insert(ticket);
  while (left_early_.erase(current_) > 0) ++current_;
  changed_.notify_all();
}

bool Turnstile::drain(Deadline deadline) {
  Turn last(*this);
  return last.enter(deadline);
}

Object::Object(std::shared_ptr<Communicator> communicator, const char* name)
    : communicator_(std::move(communicator)), name_(name), id_(next_object_id()) {
  const Topology& topology = communicator_->topology();
  const int rank = communicator_->rank();
  // Spinning while others wait for the core would only hold up the rank that is waited for.
  spins_ = topology.ranks_on_host(rank) <= topology.place(rank).cores ? kSpinsOfOwnCore : 0;
}

void Object::check_usable() const {
  check(of_this_process(), ErrorCode::invalid_usage,
        "this {} object was made by process {}, of which this one is a forked child; a child makes "
        "objects of its own",
        name_, process_.pid());
  std::lock_guard lock(mutex_);
  if (!status_.error) return;
  const Error& first = *status_.error;
  throw Error(
      ErrorCode::failed_earlier,
      fmt::format("this {} object failed in an earlier call and cannot be used any more: {}", name_,
                  first.what()),
      {first.rank(), first.peer(), first.phase()});
}

void Object::fail(const Error& error) {
  std::lock_guard lock(mutex_);
  if (!status_.error) status_.error = error;
  log(LogLevel::debug, Subsystem::ep, "{} object failed: {}", name_, error.what());
}

void Object::note_invalid_ids(const Route& route, const ExpertIds& ids) {
  if (route.invalid_ids == 0) return;
  std::lock_guard lock(mutex_);
  if (status_.invalid_expert_ids == 0) {
    const std::int64_t i = route.first_invalid;
    const std::int64_t value = ids.wide ? static_cast<const std::int64_t*>(ids.data)[i]
                                        : static_cast<const std::int32_t*>(ids.data)[i];
    status_.first_invalid_id =
        fmt::format("topk_idx[{}, {}] = {}", i / route.top_k, i % route.top_k, value);
    log(LogLevel::warn, Subsystem::ep, "{} is no expert of {} and counts as no selection",
        status_.first_invalid_id, route.placement.experts);
  }
  status_.invalid_expert_ids += route.invalid_ids;
}

void Object::note_dropped_rows(std::int64_t rows) {
  if (rows == 0) return;
  std::lock_guard lock(mutex_);
  status_.dropped_rows += rows;
}

void Object::note_timeout(std::chrono::milliseconds timeout) const {
  std::lock_guard lock(mutex_);
  longest_ = std::max(longest_, timeout);
}

Status Object::status() const {
  std::lock_guard lock(mutex_);
  return status_;
}

void keep_for_ever(std::shared_ptr<void> what) noexcept {
  static std::mutex mutex;
  static auto* kept = new std::vector<std::shared_ptr<void>>;
  std::lock_guard lock(mutex);
  kept->push_back(std::move(what));
}

void Object::note_leak() const noexcept {
  log(LogLevel::warn, Subsystem::ep,
      "a {} object was destroyed while its work was held up for longer than the deadline; its "
      "memory is not given back",
      name_);
}

Deadline Object::end_of_all() const {
  std::lock_guard lock(mutex_);
  return Deadline::after(std::max(longest_, communicator_->timeout()) +
                         std::chrono::milliseconds(1000));
}

WaitContext Object::wait_context(std::optional<std::chrono::milliseconds> timeout,
                                 const char* operation) const {
  return {communicator_.get(), Deadline::after(budget(timeout)), operation, spins_};
}

void Object::execute(const Execution& how, Turnstile& turnstile,
                     std::function<void(const WaitContext&)> work) {
  const std::chrono::milliseconds most = budget(how.timeout);
  note_timeout(most);
  auto guarded = [this, operation = how.operation, most, work = std::move(work),
                  turn = std::make_shared<Turn>(turnstile)] {
    const bool my_turn = turn->enter(Deadline::after(most));
    check_usable();
    try {
      if (!my_turn)
        throw Error(ErrorCode::timeout,
                    fmt::format("{} waited {} ms for an earlier operation of its lane; is the "
                                "stream of that one held up by other work?",
                                operation, most.count()),
                    {communicator_->rank(), -1, Phase::none});
      work(wait_context(most, operation));
    } catch (const Error& error) {
      fail(error);
      throw;
    } catch (const std::exception& error) {
      fail(Error(ErrorCode::system, error.what(), {communicator_->rank(), -1, Phase::none}));
      throw;
    }
  };
  if (how.stream.present())
    how.stream.queue()->enqueue(std::move(guarded));
  else
    guarded();
}

void Object::check_handle(const HandleState* state) const {
  check(state != nullptr, ErrorCode::invalid_usage,
        "handle is empty; it must be one that dispatch returned");
  check(state->object == id_, ErrorCode::invalid_usage,
        "handle was made by another object; combine must be called on the {} object whose dispatch "
        "made it",
        name_);
}

void check_sms(int sms, int most) {
  check_argument(sms >= 0 && sms <= most, "sms is {}; it must be from 0 to the {} of the object",
                 sms, most);
}

int team_size(const Communicator& communicator, int asked) {
  constexpr int kMostByDefault = 8;
  check_argument(asked >= 0 && asked <= 1024, "threads is {}; it must be from 0 to 1024", asked);
  if (asked > 0) return asked;
  if (Env::get().threads > 0) return Env::get().threads;
  const Topology& topology = communicator.topology();
  const int rank = communicator.rank();
  return std::clamp(topology.place(rank).cores / topology.ranks_on_host(rank), 1, kMostByDefault);
}

Allocator host_allocator() {
  return {
      [](void*, const AllocationRequest& request) { return allocate_host(request.like.bytes()); },
      nullptr};
}

TensorView OutputMaker::make(std::string_view name, DType dtype,
                             std::initializer_list<std::int64_t> shape) {
  const TensorView like(nullptr, dtype, shape);
  const std::size_t bytes = like.bytes();
  Allocation allocation = allocator_({name, like});
  check(allocation.data != nullptr || bytes == 0, ErrorCode::capacity,
        "the allocator gave no memory for {} ({} bytes)", name, bytes);
  check_argument(reinterpret_cast<std::uintptr_t>(allocation.data) % 16 == 0,
                 "the allocator gave {} at {}; it must be aligned to 16 bytes", name,
                 fmt::ptr(allocation.data));
  owners_->push_back(std::move(allocation.owner));
  return {allocation.data, dtype, shape};
}

}  // namespace ep

}  // namespace expertwire
