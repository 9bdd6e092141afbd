#include "comm/proxy/proxies.hpp"

#include <algorithm>

#include "base/check.hpp"
#include "base/env.hpp"
#include "comm/proxy/mapped_carrier.hpp"
#include "comm/requests.hpp"

namespace expertwire::inline v0 {

namespace {

constexpr int kSpinsAlone = 2000;  // where every proxy has a core to itself
constexpr int kSpinsShared = 64;

}  // namespace

int Proxies::usual_count(int cores, int ranks_on_host) {
  return std::clamp(cores / (4 * std::max(ranks_on_host, 1)), 1, 4);
}

Proxies::Proxies(Setting setting) : setting_(std::move(setting)) {
  make_clients();
  const Communicator& c = *setting_.communicator;
  for (int peer = 0; peer < c.size(); ++peer) {
    connections_.push_back(&channels_.make(peer));
    carriers_.push_back(make_carrier(peer));
  }
  const RankPlace& place = c.topology().place(c.rank());
  const int threads = c.topology().ranks_on_host(c.rank()) * (setting_.count + 1);
  for (int index = 0; index < setting_.count; ++index) {
    Proxy::Setting of_proxy;
    of_proxy.index = index;
    of_proxy.memories = setting_.memories;
    of_proxy.channels = &channels_;
    of_proxy.carriers.resize(carriers_.size());
    for (std::size_t peer = static_cast<std::size_t>(index); peer < carriers_.size();
         peer += static_cast<std::size_t>(setting_.count))
      of_proxy.carriers[peer] = carriers_[peer].get();
    if (!setting_.engines.empty())
      of_proxy.engine = setting_.engines[static_cast<std::size_t>(index)].get();
    of_proxy.kernels_device = c.cuda_device();
    of_proxy.failed = [this](const std::string& why) { fail(why); };
    of_proxy.spins = place.cores > threads ? kSpinsAlone : kSpinsShared;
    proxies_.push_back(std::make_unique<Proxy>(std::move(of_proxy)));
  }
}

Proxies::~Proxies() {
  proxies_.clear();  // what is under way goes out; then engines close
  setting_.engines.clear();
  carriers_.clear();
  copier_.reset();  // it may still say that it failed
}

void Proxies::make_clients() {
  for (const auto& engine : setting_.engines) {
    auto network = std::make_shared<NetworkSetting>();
    network->job = setting_.job;
    network->rank = setting_.communicator->rank();
    network->memories = setting_.memories;
    network->most_in_flight = std::max<std::size_t>(
        static_cast<std::size_t>(Env::get().nic_bytes) / setting_.engines.size(), 1);
    network->silence = setting_.silence;
    network->lost = setting_.lost;
    networks_.push_back(network);
    clients_.push_back(std::make_unique<NetworkClient>(network));
    engine->set_client(clients_.back().get());
  }
}

std::unique_ptr<Carrier> Proxies::make_carrier(int peer) {
  const auto rank = static_cast<std::size_t>(peer);
  if (rank >= setting_.addresses.size() || setting_.addresses[rank].empty())
    return make_mapped_carrier(peer);
  const std::size_t mine = rank % setting_.engines.size();
  Engine& engine = *setting_.engines[mine];
  // Of the peer's engines the one that serves this rank.
  const auto& theirs = setting_.addresses[rank];
  engine.set_address(
      peer, theirs[static_cast<std::size_t>(setting_.communicator->rank()) % theirs.size()]);
  auto carrier = std::make_unique<NetworkCarrier>(
      peer, engine, networks_[mine],
      rank < setting_.same_version.size() && setting_.same_version[rank]);
  clients_[mine]->add(peer, carrier.get());
  return carrier;
}

Proxies::Sent Proxies::sent() const {
  Sent sum;
  for (const auto& network : networks_) {
    sum.messages += network->counters.messages;
    sum.message_bytes += network->counters.message_bytes;
    sum.writes += network->counters.writes;
  }
  return sum;
}

std::unique_ptr<Carrier> Proxies::make_mapped_carrier(int peer) {
  if (setting_.mapped) return setting_.mapped(peer);
  if (setting_.device < 0) return std::make_unique<MappedCarrier>();
  if (!copier_)
    copier_ = std::make_shared<Copier>(setting_.device, [this](const std::string& w) { fail(w); });
  return std::make_unique<DeviceCarrier>(copier_);
}

void Proxies::expect(int peer) noexcept {
  if (peer >= 0 && static_cast<std::size_t>(peer) < carriers_.size())
    carriers_[static_cast<std::size_t>(peer)]->expect();
}

std::uint64_t Proxies::push(const ChannelState& channel, Trigger trigger,
                            const WaitContext& context) {
  trigger.channel = channel.id;
  return of(channel.peer).push(trigger, context, channel.peer);
}

void Proxies::flush(ChannelState& channel, const WaitContext& context) {
  Trigger trigger;
  trigger.operation = Operation::flush;
  const std::uint64_t target = push(channel, trigger, context) + 1;
  wait_until(context, channel.peer, Phase::channel, target, [&] {
    channel.check();
    return std::atomic_ref(channel.flushed).load(std::memory_order_acquire) >= target;
  });
  channel.check();
}

std::optional<Error> Proxies::failure() {
  if (!failed_.load(std::memory_order_acquire)) return std::nullopt;
  std::lock_guard lock(mutex_);
  return failure_;
}

void Proxies::fail(const std::string& why) {
  std::lock_guard lock(mutex_);
  if (!failure_)
    failure_ = Error(ErrorCode::system, why, {setting_.communicator->rank(), -1, Phase::channel});
  failed_.store(true, std::memory_order_release);
}

Trigger put_trigger(Operation operation, const PutRequest& request) {
  Trigger trigger;
  trigger.operation = operation;
  trigger.source = request.source.id();
  trigger.source_offset = request.source_offset;
  trigger.destination = request.destination.id();
  trigger.destination_offset = request.destination_offset;
  trigger.bytes = request.bytes;
  return trigger;
}

namespace {

/// Calls are queued in the order in which each thread makes them, and carried in that order.
class QueuedConnection final : public Connection {
 public:
  QueuedConnection(Proxies& proxies, Communicator& communicator, int peer,
                   std::string_view transport)
      : proxies_(proxies), communicator_(communicator), peer_(peer), transport_(transport) {}

  int peer() const noexcept override { return peer_; }
  std::string_view transport() const noexcept override { return transport_; }

 private:
  void do_put(const PutRequest& r) override {
    check_registered("put: destination", r.destination);
    check_registered("put: source", r.source);
    push("Connection::put", put_trigger(Operation::put, r));
  }
  void do_signal(const SignalRequest& r) override {
    push_word("Connection::signal", Operation::store, r.destination, r.destination_offset,
              static_cast<std::int64_t>(r.value));
  }
  void do_atomic_add(const AtomicAddRequest& r) override {
    push_word("Connection::atomic_add", Operation::atomic_add, r.destination, r.destination_offset,
              r.value);
  }
  void do_flush(Deadline deadline) override {
    proxies_.flush(proxies_.connection(peer_), context("Connection::flush", deadline));
  }

  void push_word(const char* what, Operation operation, const Memory& memory, std::uint64_t offset,
                 std::int64_t value) {
    check_registered(what, memory);
    Trigger trigger;
    trigger.operation = operation;
    trigger.destination = memory.id();
    trigger.destination_offset = offset;
    trigger.value = value;
    push(what, trigger);
  }
  void push(const char* what, const Trigger& trigger) {
    if (auto lost = communicator_.find_lost_peer(peer_))
      throw_lost(context(what, Deadline::after({})), *lost, Phase::channel);
    proxies_.push(proxies_.connection(peer_), trigger,
                  context(what, Deadline::after(communicator_.timeout())));
  }
  WaitContext context(const char* what, Deadline deadline) const {
    return {&communicator_, deadline, what, 1000};
  }

  Proxies& proxies_;
  Communicator& communicator_;
  int peer_;
  std::string_view transport_;
};

}  // namespace

std::unique_ptr<Connection> make_queued_connection(Proxies& proxies, Communicator& communicator,
                                                   int peer, std::string_view transport) {
  return std::make_unique<QueuedConnection>(proxies, communicator, peer, transport);
}

}  // namespace expertwire
