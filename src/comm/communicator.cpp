#include "expertwire/communicator.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "base/check.hpp"
#include "base/env.hpp"
#include "base/log.hpp"
#include "base/process.hpp"
#include "comm/communicator_access.hpp"
#include "comm/device_memory.hpp"
#include "comm/endpoint.hpp"
#include "comm/links.hpp"
#include "comm/memory_registry.hpp"
#include "comm/network.hpp"
#include "comm/proxy/proxies.hpp"
#include "comm/rank_pairs.hpp"
#include "comm/segment.hpp"
#include "comm/transport/staged/memory.hpp"
#include "comm/transport/transport.hpp"
#include "expertwire/version.hpp"

namespace expertwire::inline v0 {

namespace {

constexpr std::size_t kHostArena = std::size_t{1} << 36;  // address space
// Beside device memory: words of hosts and host memory for users, and behind them what staged peers
// exchange. Address space, too.
constexpr std::size_t kHostArenaBesideDevice = std::size_t{1} << 32;
constexpr std::size_t kStaging = std::size_t{1} << 35;

template <std::size_t N>
void store_text(std::array<char, N>& to, std::string_view text) {
  check(text.size() < N, ErrorCode::system, "'{}' is longer than {} characters", text, N - 1);
  to.fill('\0');
  std::memcpy(to.data(), text.data(), text.size());
}

/// A piece of a rank's memory.
Memory part_of(const Memory& whole, std::size_t begin, std::size_t bytes) {
  const std::shared_ptr<std::byte> mapping(whole.shared(), whole.data() + begin);
  return {whole.rank(), mapping, bytes, whole.kind()};
}

/// Of the memories of all ranks, by rank.
struct Descriptors {
  std::vector<Fd> host, device;

  ImportRequest request(const Endpoint& self, const Endpoint& peer) const {
    const auto r = static_cast<std::size_t>(peer.rank);
    return {self, peer, host[r], device[r]};
  }
};

/// Maps a part; where there `is_another_way`, what the system says against it is only said.
Memory import_or_say(const Transport& wire, const ImportRequest& request, bool is_another_way,
                     std::string* why) {
  try {
    return wire.import(request);
  } catch (const Error& error) {
    if (!is_another_way || error.code() != ErrorCode::system) throw;
    *why = fmt::format("its memory cannot be mapped ({})", error.what());
    return {};
  }
}

/// A number that the ranks of a job share and others do not know; it says nothing of the secret.
std::uint64_t number_of(const std::string& secret) {
  const Mac mac = authenticate(secret, "job");
  std::uint64_t number = 0;
  std::memcpy(&number, mac.data(), sizeof(number));
  return number;
}

RankPlace place_of(const Endpoint& endpoint) {
  RankPlace place;
  place.host = endpoint.host.data();
  place.process = endpoint.process;
  place.pid = endpoint.pid;
  place.cores = endpoint.cores;
  place.numa_node = endpoint.numa_node;
  place.cuda_device = endpoint.cuda.device;
  place.gpu = endpoint.cuda.uuid;
  return place;
}

}  // namespace

struct Communicator::Impl {
  std::shared_ptr<Bootstrap> bootstrap;
  std::chrono::milliseconds timeout{};
  Segment segment;
  DeviceSegment device;
  std::vector<Endpoint> endpoints;
  Topology topology;
  std::unique_ptr<Links> links;
  std::unique_ptr<Watcher> watcher;
  std::vector<std::unique_ptr<Transport>> transports = make_transports();
  std::vector<const Transport*> host_wires, device_wires;  // by rank, as the next
  std::vector<Path> paths;
  std::vector<std::unique_ptr<Connection>> connections;
  std::shared_ptr<Arena> host_arena;
  std::shared_ptr<Arena> device_arena;
  std::vector<std::shared_ptr<PinnedSegment>> pinned;  // by rank, where it is staged or this one
  std::shared_ptr<PinnedSegment> pinned_host;
  std::unique_ptr<Arena> staging;
  std::string staged_pairs, network_pairs;
  std::optional<int> proxy_count;
  std::optional<std::chrono::milliseconds> peer_timeout;
  std::optional<std::pair<int, int>> staged_pair, port_pair;
  Network network;
  std::uint64_t job = 0;  // a number that no other job has
  std::unique_ptr<MemoryRegistry> memories;
  std::mutex proxies_mutex;
  std::unique_ptr<Proxies> proxies;
  std::atomic<Proxies*> proxies_made{nullptr};
  std::string banner;
  OwnProcess process;
  std::mutex shared_mutex;
  std::shared_ptr<void> shared_state;

  Impl() = default;
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;
  ~Impl() {
    proxies.reset();
    watcher.reset();
    if (links) links->say_goodbye();
    retire_segment(segment.id);
    if (on_cuda()) retire_segment(device.endpoint.segment);
  }

  Deadline deadline() const { return Deadline::after(timeout); }
  int rank() const { return bootstrap->rank(); }
  int size() const { return bootstrap->size(); }
  bool on_cuda() const { return device.endpoint.device >= 0; }
  const Endpoint& self() const { return endpoints[static_cast<std::size_t>(rank())]; }

  void create_memory(const CommunicatorOptions& options);
  void exchange_endpoints(const CommunicatorOptions& options);
  void check_endpoints() const;
  std::string agree_on_secret();
  void connect_all();
  std::vector<std::string> map_devices(const Descriptors& descriptors, std::vector<Memory>& parts);
  void watch_all();
  const Transport& transport_to(const Endpoint& peer, MemoryKind kind, std::string* why) const;
  const Transport& transport_named(std::string_view name) const;
  void make_banner();
  void make_arenas(std::vector<Memory> host, std::vector<Memory> on_device);
  std::byte* map_staging(int rank, std::uint64_t offset, std::size_t bytes);
  void map_host(std::uint64_t offset, std::size_t bytes);
  void find_network();
  int count_proxies() const;
  void make_proxies(Communicator& communicator);
};

void Communicator::Impl::create_memory(const CommunicatorOptions& options) {
  std::optional<std::size_t> bytes = options.arena_bytes;
  if (!bytes && Env::get().arena_bytes) bytes = static_cast<std::size_t>(*Env::get().arena_bytes);
  if (!options.cuda_device) {
    segment = create_segment(bytes.value_or(kHostArena));
    return;
  }
  segment = create_segment(kHostArenaBesideDevice + kStaging);
  const int ordinal = *options.cuda_device;
  device = create_device_segment(ordinal, bytes ? *bytes : default_device_arena(ordinal));
}

void Communicator::Impl::exchange_endpoints(const CommunicatorOptions& options) {
  create_memory(options);
  staged_pairs = options.staged_pairs.value_or(Env::get().staged_pairs);
  network_pairs = options.network_pairs.value_or(Env::get().network_pairs);
  proxy_count = options.proxies;
  peer_timeout = options.peer_timeout;
  check_argument(!proxy_count || (*proxy_count >= 0 && *proxy_count <= 64),
                 "proxies is {}; it must be from 1 to 64, or 0 for the usual number",
                 proxy_count.value_or(0));
  links = std::make_unique<Links>(rank());
  const RankPlace place = local_place();

  endpoints.resize(static_cast<std::size_t>(size()));
  Endpoint& mine = endpoints[static_cast<std::size_t>(rank())];
  store_text(mine.version, kVersion);
  store_text(mine.host, place.host);
  store_text(mine.link_address, links->address());
  mine.process = place.process;
  mine.segment = segment.id;
  mine.arena_bytes = segment.bytes;
  mine.rank = rank();
  mine.pid = place.pid;
  mine.cores = place.cores;
  mine.numa_node = place.numa_node;
  mine.ranks_per_node = options.ranks_per_node.value_or(Env::get().ranks_per_node);
  mine.wants_network = network_pairs.empty() || network_pairs == "none" ? 0 : 1;
  mine.cuda = device.endpoint;
  bootstrap->all_gather(endpoints.data(), sizeof(Endpoint), deadline());
  check_endpoints();
  std::vector<RankPlace> places;
  for (const Endpoint& peer : endpoints) places.push_back(place_of(peer));
  topology = Topology(std::move(places), self().ranks_per_node);
}

void Communicator::Impl::check_endpoints() const {
  for (const Endpoint& peer : endpoints) {
    check(peer.version == self().version, ErrorCode::mismatch,
          "rank {} runs expertwire {}, rank {} runs {}", peer.rank, peer.version.data(), rank(),
          kVersion);
    check(peer.ranks_per_node == self().ranks_per_node, ErrorCode::mismatch,
          "rank {} has ranks_per_node {}, rank {} has {}", peer.rank, peer.ranks_per_node, rank(),
          self().ranks_per_node);
    check((peer.cuda.device >= 0) == on_cuda(), ErrorCode::mismatch,
          "rank {} uses {}, rank {} uses {}; all ranks give a cuda_device, or none does", peer.rank,
          peer.cuda.device >= 0 ? "a CUDA device" : "the CPU backend", rank(),
          on_cuda() ? "a CUDA device" : "the CPU backend");
  }
}

void Communicator::Impl::watch_all() {
  std::vector<Watcher::Peer> peers;
  for (const Endpoint& peer : endpoints)
    peers.push_back({peer.pid, peer.process == self().process ? peer.segment : 0});
  watcher = std::make_unique<Watcher>(rank(), *links, std::move(peers));
}

/// The links' secret: rank 0 draws it, the bootstrap (which has let in only ranks of this job)
/// carries it.
std::string Communicator::Impl::agree_on_secret() {
  std::string secret = make_secret();
  bootstrap->broadcast(secret.data(), secret.size(), 0, deadline());
  return secret;
}

const Transport& Communicator::Impl::transport_to(const Endpoint& peer, MemoryKind kind,
                                                  std::string* why) const {
  std::string reasons;
  for (const auto& transport : transports) {
    if (transport->kind() != kind) continue;
    const Reach reach = transport->reach(self(), peer);
    if (reach.possible) {
      *why = reach.why;
      return *transport;
    }
    reasons += fmt::format("{}{}: {}", reasons.empty() ? "" : ", ", transport->name(), reach.why);
  }
  throw Error(ErrorCode::unsupported,
              fmt::format("no wire of this build reaches rank {} ({})", peer.rank, reasons),
              {rank(), peer.rank, Phase::setup});
}

const Transport& Communicator::Impl::transport_named(std::string_view name) const {
  for (const auto& transport : transports)
    if (transport->name() == name) return *transport;
  throw Error(ErrorCode::unsupported, fmt::format("this build has no transport {}", name));
}

/// Maps the device memory of every rank, and says why that of some is staged in place of that;
/// empty: it is not. A pair is staged if one of its ranks says so.
std::vector<std::string> Communicator::Impl::map_devices(const Descriptors& descriptors,
                                                         std::vector<Memory>& parts) {
  const auto ranks = static_cast<std::size_t>(size()), mine = static_cast<std::size_t>(rank());
  const RankPairs asked("staged_pairs (or EXPERTWIRE_STAGED_PAIRS)", staged_pairs, size());
  const Transport &mapped = transport_named("cuda_ipc"), &staged = transport_named("staged");
  std::vector<std::string> why(ranks);
  std::vector<std::uint8_t> wanted(ranks * ranks);
  parts.resize(ranks);
  for (std::size_t r = 0; r < ranks; ++r) {
    const Endpoint& peer = endpoints[r];
    const Reach reach = mapped.reach(self(), peer);
    const bool can_stage = r != mine && staged.reach(self(), peer).possible;
    if (can_stage && asked.has(rank(), peer.rank))
      why[r] = "asked for by EXPERTWIRE_STAGED_PAIRS";
    else if (can_stage && !reach.possible)
      why[r] = reach.why;
    else if (reach.possible)
      parts[r] = import_or_say(mapped, descriptors.request(self(), peer), can_stage, &why[r]);
    wanted[mine * ranks + r] = why[r].empty() ? 0 : 1;
  }
  bootstrap->all_gather(wanted.data(), ranks, deadline());
  for (std::size_t r = 0; r < ranks; ++r) {
    if (why[r].empty() && wanted[r * ranks + mine] != 0)
      why[r] = fmt::format("rank {} asks for it", r);
    if (!why[r].empty()) parts[r] = staged.import(descriptors.request(self(), endpoints[r]));
  }
  const auto first = std::find(wanted.begin(), wanted.end(), 1);
  if (first != wanted.end()) {
    const auto at = static_cast<std::size_t>(first - wanted.begin());
    staged_pair = std::minmax({static_cast<int>(at / ranks), static_cast<int>(at % ranks)});
  }
  return why;
}

void Communicator::Impl::connect_all() {
  const std::string secret = agree_on_secret();
  std::vector<Links::Peer> neighbours;
  for (const Endpoint& peer : endpoints)
    if (peer.host == self().host && peer.process != self().process)
      neighbours.push_back({peer.rank, peer.link_address.data()});
  links->connect(neighbours, secret, size(), deadline());
  Descriptors descriptors;
  descriptors.host = links->exchange(segment.fd, deadline());
  // Ranks that share by bytes have no second descriptor; the first stands in for it.
  descriptors.device = on_cuda() ? links->exchange(device.fd ? device.fd : segment.fd, deadline())
                                 : std::vector<Fd>(endpoints.size());

  job = number_of(secret);
  find_network();
  std::vector<Memory> host_parts, device_parts, staging_parts;
  std::vector<std::string> staged(endpoints.size());
  if (on_cuda()) staged = map_devices(descriptors, device_parts);
  for (const Endpoint& peer : endpoints) {
    const auto r = static_cast<std::size_t>(peer.rank);
    std::string why;
    const bool port = network.has(peer.rank);
    const Transport* wire =
        port ? &transport_named("ucx") : &transport_to(peer, MemoryKind::host, &why);
    if (port) why = network.why(peer.rank);
    host_wires.push_back(wire);
    host_parts.push_back(wire->import(descriptors.request(self(), peer)));
    if (on_cuda() && port) {
      device_wires.push_back(wire);
      device_parts[r] = Memory(peer.rank, nullptr, peer.cuda.arena_bytes, MemoryKind::cuda);
      staging_parts.push_back({peer.rank, nullptr, 0});
    } else if (on_cuda()) {
      const Memory whole = host_parts.back();
      host_parts.back() = part_of(whole, 0, kHostArenaBesideDevice);
      staging_parts.push_back(part_of(whole, kHostArenaBesideDevice, kStaging));
      wire = staged[r].empty() ? &transport_to(peer, MemoryKind::cuda, &why)
                               : &transport_named("staged");
      if (!staged[r].empty()) why = staged[r];
      device_wires.push_back(wire);
    }
    connections.push_back(port ? nullptr : wire->connect(self(), peer.rank));
    log(LogLevel::debug, Subsystem::conn, "rank {} to {}: {} ({})", rank(), peer.rank, wire->name(),
        why);
    const PathKind direct = staged[r].empty() ? PathKind::mapped : PathKind::staged;
    paths.push_back({port ? PathKind::port : direct, std::string(wire->name()), std::move(why)});
  }
  make_arenas(std::move(host_parts), std::move(device_parts));
  if (on_cuda()) {
    pinned.resize(endpoints.size());
    staging = std::make_unique<Arena>(std::move(staging_parts), rank(), Arena::Pages::kept);
  }
  segment.fd = Fd();
  device.fd = Fd();
  bootstrap->barrier(deadline());  // every rank has every mapping: from here on ranks may leave
  make_banner();
}

/// Arenas are the first memories that have numbers: host memory of rank r is r, at every rank, and
/// its device memory size + r.
void Communicator::Impl::make_arenas(std::vector<Memory> host, std::vector<Memory> on_device) {
  for (std::size_t i = 0; i < host.size(); ++i)
    host[i] = CommunicatorAccess::numbered(std::move(host[i]), static_cast<std::uint32_t>(i), {});
  for (std::size_t i = 0; i < on_device.size(); ++i)
    on_device[i] = CommunicatorAccess::numbered(std::move(on_device[i]),
                                                static_cast<std::uint32_t>(host.size() + i), {});
  // Pages that a GPU may have mapped stay what they are.
  host_arena = std::make_shared<Arena>(std::move(host), rank(),
                                       on_cuda() ? Arena::Pages::kept : Arena::Pages::given_back);
  if (on_cuda()) device_arena = std::make_shared<Arena>(std::move(on_device), rank());
  auto wire = [this](int peer, MemoryKind kind) -> const Transport& {
    const auto& wires = kind == MemoryKind::host ? host_wires : device_wires;
    return *wires[static_cast<std::size_t>(peer)];
  };
  std::function<std::string(const Memory&)> make_key;
  if (network.present())
    make_key = [engine = network.engines.front().get()](const Memory& memory) {
      return memory.kind() == MemoryKind::host ? engine->make_key(memory.data(), memory.bytes())
                                               : std::string();
    };
  memories = std::make_unique<MemoryRegistry>(
      MemoryRegistry::Setting{endpoints, rank(), job, host_arena, device_arena, wire, make_key});
}

void Communicator::Impl::map_host(std::uint64_t offset, std::size_t bytes) {
  std::lock_guard lock(shared_mutex);
  if (!pinned_host) pinned_host = PinnedSegment::of(host_arena->local().shared());
  pinned_host->map(device.endpoint.device, offset, bytes);
}

int Communicator::Impl::count_proxies() const {
  const int asked = proxy_count.value_or(Env::get().proxies);
  return asked > 0 ? asked : Proxies::usual_count(self().cores, topology.ranks_on_host(rank()));
}

/// Which pairs have to go over a network, or are to; all ranks come to the same.
void Communicator::Impl::find_network() {
  const bool anywhere = topology.hosts() > 1 ||
                        std::any_of(endpoints.begin(), endpoints.end(),
                                    [](const Endpoint& peer) { return peer.wants_network != 0; });
  if (!anywhere) return;
  auto mapped = [this](const Endpoint& peer) {
    return std::any_of(transports.begin(), transports.end(), [&](const auto& transport) {
      return transport->name() != "ucx" && transport->kind() == MemoryKind::host &&
             transport->reach(self(), peer).possible;
    });
  };
  network =
      Network::agree({*bootstrap, endpoints, network_pairs, count_proxies(), deadline()}, mapped);
  port_pair = network.first_pair;
}

void Communicator::Impl::make_proxies(Communicator& communicator) {
  Proxies::Setting setting;
  setting.communicator = &communicator;
  setting.memories = &memories->table();
  setting.count = count_proxies();
  setting.device = device.endpoint.device;
  setting.engines = std::move(network.engines);
  setting.addresses = network.addresses;
  setting.same_version = network.same_version;
  setting.job = job;
  setting.silence = peer_timeout.value_or(std::chrono::milliseconds(Env::get().peer_timeout_ms));
  setting.lost = [this](int peer, const std::string& why, bool in_good_order) {
    watcher->report(peer, in_good_order ? Links::State::left : Links::State::died, why);
  };
  proxies = std::make_unique<Proxies>(std::move(setting));
  for (int peer = 0; peer < size(); ++peer)
    if (auto& connection = connections[static_cast<std::size_t>(peer)]; !connection)
      connection = make_queued_connection(*proxies, communicator, peer, "ucx");
  proxies_made.store(proxies.get(), std::memory_order_release);
}

std::byte* Communicator::Impl::map_staging(int rank, std::uint64_t offset, std::size_t bytes) {
  std::lock_guard lock(shared_mutex);
  std::shared_ptr<PinnedSegment>& segment_of_rank = pinned[static_cast<std::size_t>(rank)];
  if (!segment_of_rank) segment_of_rank = PinnedSegment::of(staging->part(rank).shared());
  return segment_of_rank->map(device.endpoint.device, offset, bytes);
}

void Communicator::Impl::make_banner() {
  struct Wire {
    int ranks = 0;
    std::string_view why;
  };
  std::map<std::string_view, Wire> wires;
  for (const Path& path : paths) {
    Wire& wire = wires[path.transport];
    ++wire.ranks;
    wire.why = path.why;
  }
  banner = fmt::format("expertwire {}: {} backend, {} rank{} on {} node{} ({} host{}), {}; wires:",
                       kVersion, on_cuda() ? "CUDA" : "CPU", size(), size() == 1 ? "" : "s",
                       topology.nodes(), topology.nodes() == 1 ? "" : "s", topology.hosts(),
                       topology.hosts() == 1 ? "" : "s", bootstrap->kind());
  const char* separator = " ";
  for (const auto& [name, wire] : wires) {
    banner += fmt::format("{}{} to {} rank{} ({})", separator, name, wire.ranks,
                          wire.ranks == 1 ? "" : "s", wire.why);
    separator = ", ";
  }
}

Communicator::Communicator(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Communicator::~Communicator() {
  if (!impl_->process.here()) std::ignore = impl_.release();  // a forked child leaves nothing
}

std::shared_ptr<Communicator> Communicator::create(std::shared_ptr<Bootstrap> bootstrap,
                                                   const CommunicatorOptions& options) {
  check_argument(bootstrap != nullptr, "Communicator::create: bootstrap is null");
  check_log_settings();
  auto impl = std::make_unique<Impl>();
  impl->bootstrap = std::move(bootstrap);
  impl->timeout = options.timeout.value_or(std::chrono::milliseconds(Env::get().timeout_ms));
  impl->exchange_endpoints(options);
  impl->connect_all();
  impl->watch_all();
  if (impl->rank() == 0) log(LogLevel::info, Subsystem::topo, "{}", impl->banner);
  std::shared_ptr<Communicator> made(new Communicator(std::move(impl)));
  if (made->impl_->network.present()) CommunicatorAccess::proxies(*made);
  return made;
}

std::shared_ptr<Communicator> Communicator::from_environment(const CommunicatorOptions& options) {
  return create(bootstrap_from_environment(), options);
}

int Communicator::rank() const noexcept { return impl_->rank(); }
int Communicator::size() const noexcept { return impl_->size(); }
const Topology& Communicator::topology() const noexcept { return impl_->topology; }
int Communicator::cuda_device() const noexcept { return impl_->device.endpoint.device; }
Arena& Communicator::host_arena() noexcept { return *impl_->host_arena; }
Arena& Communicator::arena() noexcept {
  return impl_->on_cuda() ? *impl_->device_arena : *impl_->host_arena;
}
std::chrono::milliseconds Communicator::timeout() const noexcept { return impl_->timeout; }
const std::string& Communicator::banner() const noexcept { return impl_->banner; }

std::string_view to_string(PathKind kind) noexcept {
  switch (kind) {
    case PathKind::mapped:
      return "mapped";
    case PathKind::staged:
      return "staged";
    case PathKind::port:
      return "port";
  }
  return "?";
}

const Path& Communicator::path(int peer) const {
  check_argument(peer >= 0 && peer < size(), "path: peer is {}; it must be from 0 to {}", peer,
                 size() - 1);
  return impl_->paths[static_cast<std::size_t>(peer)];
}

std::optional<std::pair<int, int>> Communicator::staged_pair() const noexcept {
  return impl_->staged_pair;
}
std::optional<std::pair<int, int>> Communicator::port_pair() const noexcept {
  return impl_->port_pair;
}

Connection& Communicator::connection(int peer) {
  check_argument(peer >= 0 && peer < size(), "connection: peer is {}; it must be from 0 to {}",
                 peer, size() - 1);
  return *impl_->connections[static_cast<std::size_t>(peer)];
}

Memory Communicator::register_memory(void* data, std::size_t bytes, MemoryKind kind) {
  return impl_->memories->add(data, bytes, kind);
}
Memory Communicator::allocate_memory(std::size_t bytes) {
  Memory memory = impl_->memories->allocate(bytes);
  const std::byte* const arena = impl_->host_arena->local().data();
  if (impl_->on_cuda()) impl_->map_host(static_cast<std::uint64_t>(memory.data() - arena), bytes);
  return memory;
}
void Communicator::deregister_memory(const Memory& memory) { impl_->memories->remove(memory); }
Memory Communicator::open_memory(std::string_view serialized) {
  return impl_->memories->open(serialized);
}

void Communicator::all_gather(void* data, std::size_t bytes_per_rank) {
  check_argument(data != nullptr || bytes_per_rank == 0,
                 "Communicator::all_gather: data is null, for {} bytes a rank", bytes_per_rank);
  impl_->bootstrap->all_gather(data, bytes_per_rank, impl_->deadline());
}

void Communicator::barrier() { impl_->bootstrap->barrier(impl_->deadline()); }

std::optional<Error> Communicator::find_lost_peer(int awaited) {
  if (auto lost = impl_->watcher->find_lost(awaited)) return lost;
  Proxies* const proxies = impl_->proxies_made.load(std::memory_order_acquire);
  if (proxies == nullptr) return std::nullopt;
  proxies->expect(awaited);
  return proxies->failure();
}

Watcher& CommunicatorAccess::watcher(Communicator& communicator) {
  return *communicator.impl_->watcher;
}

Proxies& CommunicatorAccess::proxies(Communicator& communicator) {
  Communicator::Impl& impl = *communicator.impl_;
  std::lock_guard lock(impl.proxies_mutex);
  if (!impl.proxies) impl.make_proxies(communicator);
  return *impl.proxies;
}

const MemoryTable& CommunicatorAccess::memories(Communicator& communicator) {
  return communicator.impl_->memories->table();
}

void CommunicatorAccess::map_host(Communicator& communicator, std::uint64_t offset,
                                  std::size_t bytes) {
  communicator.impl_->map_host(offset, bytes);
}

Arena& CommunicatorAccess::staging(Communicator& communicator) {
  return *communicator.impl_->staging;
}

std::byte* CommunicatorAccess::map_staging(Communicator& communicator, int rank,
                                           std::uint64_t offset, std::size_t bytes) {
  return communicator.impl_->map_staging(rank, offset, bytes);
}

std::shared_ptr<void> CommunicatorAccess::shared_state(
    Communicator& communicator, const std::function<std::shared_ptr<void>()>& make) {
  Communicator::Impl& impl = *communicator.impl_;
  std::lock_guard lock(impl.shared_mutex);
  if (!impl.shared_state) impl.shared_state = make();
  return impl.shared_state;
}

}  // namespace expertwire
