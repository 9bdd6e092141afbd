#include "expertwire/port_channel.hpp"

#include <atomic>

#include "base/check.hpp"
#include "base/process.hpp"
#include "comm/communicator_access.hpp"
#include "comm/proxy/proxies.hpp"
#include "comm/requests.hpp"

namespace expertwire::inline v0 {

namespace {

constexpr std::uint64_t kNoRoom = UINT64_MAX;
constexpr std::chrono::milliseconds kPatienceAtTheEnd{1000};

/// What a peer writes at this rank for one channel.
struct alignas(64) Line {
  std::uint64_t semaphore;
  std::uint64_t farewell;
};

/// The lines of all peers, in this rank's host arena. They go back when all peers have said that
/// nothing follows.
class Lines {
 public:
  explicit Lines(const std::shared_ptr<Communicator>& communicator)
      : communicator_(communicator), offsets_(static_cast<std::size_t>(communicator->size())) {
    std::uint64_t& mine = offsets_[static_cast<std::size_t>(communicator->rank())];
    std::optional<Error> refused;
    try {
      mine = communicator->host_arena().carve(offsets_.size() * sizeof(Line));
      for (int peer = 0; peer < communicator->size(); ++peer) {
        Line& line = of(peer);
        std::atomic_ref(line.semaphore).store(0);
        std::atomic_ref(line.farewell).store(0);
      }
    } catch (const Error& error) {
      refused = error;
      mine = kNoRoom;
    }
    // This gather is also the barrier after which peers may write.
    communicator->all_gather(offsets_.data(), sizeof(std::uint64_t));
    if (refused) throw *refused;
    for (std::size_t peer = 0; peer < offsets_.size(); ++peer)
      if (offsets_[peer] == kNoRoom) {
        communicator->host_arena().give_back(mine);
        throw Error(ErrorCode::capacity,
                    fmt::format("the host arena of rank {} has no room for port channels", peer),
                    {communicator->rank(), static_cast<int>(peer), Phase::setup});
      }
  }
  Lines(const Lines&) = delete;
  Lines& operator=(const Lines&) = delete;
  ~Lines() {
    if (!process_.here()) return;
    auto all_left = [first = &of(0), size = communicator_->size()] {
      for (int peer = 0; peer < size; ++peer)
        if (std::atomic_ref(first[peer].farewell).load(std::memory_order_acquire) == 0)
          return false;
      return true;
    };
    communicator_->host_arena().give_back_when(
        offsets_[static_cast<std::size_t>(communicator_->rank())], all_left);
  }

  void let_kernels_see() const {
    CommunicatorAccess::map_host(*communicator_,
                                 offsets_[static_cast<std::size_t>(communicator_->rank())],
                                 offsets_.size() * sizeof(Line));
  }

  Communicator& communicator() const { return *communicator_; }
  /// What `peer` writes here.
  Line& of(int peer) const {
    std::byte* base = communicator_->host_arena().local().data();
    return reinterpret_cast<Line*>(base +
                                   offsets_[static_cast<std::size_t>(communicator_->rank())])[peer];
  }
  /// Where this rank writes in the host arena of `peer`.
  std::uint64_t at(int peer) const {
    return offsets_[static_cast<std::size_t>(peer)] +
           static_cast<std::uint64_t>(communicator_->rank()) * sizeof(Line);
  }

 private:
  OwnProcess process_;
  std::shared_ptr<Communicator> communicator_;
  std::vector<std::uint64_t> offsets_;  // by rank, in its host arena
};

}  // namespace

struct PortChannel::Impl {
  std::shared_ptr<Lines> lines;
  Proxies* proxies = nullptr;
  ChannelState* state = nullptr;
  std::uint64_t expected = 0;
  OwnProcess process;

  Impl() = default;
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;
  ~Impl() {
    if (state == nullptr || !process.here()) return;
    try {
      Trigger trigger;
      trigger.operation = Operation::leave;
      push("closing a PortChannel", trigger, kPatienceAtTheEnd);
      proxies->channels().forget(*state);
    } catch (const std::exception&) {  // the job has failed; the state stays until its end
    }
  }

  WaitContext context(const char* what, std::chrono::milliseconds timeout) const {
    return {&lines->communicator(), Deadline::after(timeout), what, 1000};
  }
  void push(const char* what, const Trigger& trigger, std::chrono::milliseconds timeout) const {
    proxies->push(*state, trigger, context(what, timeout));
  }
  /// Refuses what can go nowhere any more, then queues.
  void ask(const char* what, const Trigger& trigger) const {
    Communicator& communicator = lines->communicator();
    state->check();
    if (auto lost = communicator.find_lost_peer(state->peer))
      throw_lost(context(what, {}), *lost, Phase::channel);
    push(what, trigger, communicator.timeout());
  }
};

PortChannel::PortChannel(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
PortChannel::PortChannel(PortChannel&&) noexcept = default;
PortChannel& PortChannel::operator=(PortChannel&&) noexcept = default;
PortChannel::~PortChannel() = default;

std::vector<PortChannel> PortChannel::open_all(const std::shared_ptr<Communicator>& communicator) {
  check_argument(communicator != nullptr, "PortChannel::open_all: communicator is null");
  Proxies& proxies = CommunicatorAccess::proxies(*communicator);
  const auto lines = std::make_shared<Lines>(communicator);
  if (communicator->cuda_device() >= 0) lines->let_kernels_see();
  std::vector<PortChannel> channels;
  for (int peer = 0; peer < communicator->size(); ++peer) {
    auto impl = std::make_unique<Impl>();
    impl->lines = lines;
    impl->proxies = &proxies;
    impl->state = &proxies.channels().make(peer);
    if (communicator->cuda_device() >= 0) impl->state->flushed_kernels = make_kernel_word();
    impl->state->semaphore = communicator->host_arena().part(peer).id();
    impl->state->semaphore_offset = lines->at(peer) + offsetof(Line, semaphore);
    impl->state->farewell_offset = lines->at(peer) + offsetof(Line, farewell);
    channels.push_back(PortChannel(std::move(impl)));
  }
  return channels;
}

PortChannel::Impl& PortChannel::open() const {
  check(impl_ != nullptr, ErrorCode::invalid_usage,
        "this PortChannel has been moved from; use the one that it was moved to");
  return *impl_;
}

int PortChannel::peer() const noexcept { return impl_ ? impl_->state->peer : -1; }

void PortChannel::put(const PutRequest& request) {
  Impl& impl = open();
  check_put("PortChannel::put", request, peer());
  check_registered("PortChannel::put: destination", request.destination);
  check_registered("PortChannel::put: source", request.source);
  impl.ask("PortChannel::put", put_trigger(Operation::put, request));
}

void PortChannel::signal() {
  Trigger trigger;
  trigger.operation = Operation::signal;
  open().ask("PortChannel::signal", trigger);
}

void PortChannel::put_with_signal(const PutRequest& request) {
  Impl& impl = open();
  check_put("PortChannel::put_with_signal", request, peer());
  check_registered("PortChannel::put_with_signal: destination", request.destination);
  check_registered("PortChannel::put_with_signal: source", request.source);
  impl.ask("PortChannel::put_with_signal", put_trigger(Operation::put_with_signal, request));
}

void PortChannel::atomic_add(const AtomicAddRequest& request) {
  Impl& impl = open();
  check_word("PortChannel::atomic_add", request.destination, request.destination_offset, peer());
  check_registered("PortChannel::atomic_add: destination", request.destination);
  Trigger trigger;
  trigger.operation = Operation::atomic_add;
  trigger.destination = request.destination.id();
  trigger.destination_offset = request.destination_offset;
  trigger.value = request.value;
  impl.ask("PortChannel::atomic_add", trigger);
}

void PortChannel::flush(std::chrono::milliseconds timeout) {
  Impl& impl = open();
  impl.proxies->flush(*impl.state, impl.context("PortChannel::flush", timeout));
}

void PortChannel::wait(std::chrono::milliseconds timeout) {
  Impl& impl = open();
  const std::uint64_t target = impl.expected + 1;
  Line& line = impl.lines->of(peer());
  wait_until(impl.context("PortChannel::wait", timeout), peer(), Phase::channel, target, [&] {
    return std::atomic_ref(line.semaphore).load(std::memory_order_acquire) >= target;
  });
  impl.expected = target;
}

PortChannelDevice PortChannel::device() const {
  const Impl& impl = open();
  check(impl.state->flushed_kernels != nullptr, ErrorCode::invalid_usage,
        "PortChannel::device: the communicator is on the CPU backend");
  return {impl.proxies->of(peer()).for_kernels()->view(), &impl.lines->of(peer()).semaphore,
          impl.state->flushed_kernels.get(), impl.state->id};
}

}  // namespace expertwire
