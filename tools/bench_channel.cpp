#include "bench_channel.hpp"

#include <fmt/format.h>
#include <sys/resource.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/env.hpp"
#include "bench.hpp"
#include "comm/communicator_access.hpp"
#include "comm/proxy/mapped_carrier.hpp"
#include "comm/proxy/proxies.hpp"
#include "comm/transport/ucx/engine.hpp"
#include "expertwire/port_channel.hpp"
#include "launcher.hpp"

namespace expertwire::tools {

namespace {

constexpr std::chrono::milliseconds kLong{30000};

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::nth_element(values.begin(), values.begin() + static_cast<long>(values.size() / 2),
                   values.end());
  return values[values.size() / 2];
}

/// Two ranks, memory of both, and the channels between them.
class Pair {
 public:
  Pair(std::shared_ptr<Communicator> communicator, std::size_t bytes)
      : communicator_(std::move(communicator)), mine_(communicator_->allocate_memory(2 * bytes)) {
    std::memset(mine_.data(), 0, 2 * bytes);
    const std::string text = mine_.serialize();
    std::vector<std::array<char, 1024>> texts(2);
    const auto rank = static_cast<std::size_t>(communicator_->rank());
    std::memcpy(texts[rank].data(), text.data(), std::min<std::size_t>(text.size(), 1024));
    std::vector<std::uint64_t> lengths(2);
    lengths[rank] = text.size();
    communicator_->all_gather(texts.data(), 1024);
    communicator_->all_gather(lengths.data(), 8);
    theirs_ = communicator_->open_memory({texts[1 - rank].data(), lengths[1 - rank]});
    channels_ = PortChannel::open_all(communicator_);
    communicator_->barrier();
  }
  bool first() const { return communicator_->rank() == 0; }
  PortChannel& channel() { return channels_[first() ? 1 : 0]; }
  Communicator& communicator() { return *communicator_; }
  PutRequest put(std::size_t bytes) const { return {theirs_, 64, mine_, mine_.bytes() / 2, bytes}; }
  AtomicAddRequest add() const { return {theirs_, 0, 1}; }
  std::uint64_t word() const {
    return std::atomic_ref(*reinterpret_cast<std::uint64_t*>(mine_.data()))
        .load(std::memory_order_acquire);
  }

 private:
  std::shared_ptr<Communicator> communicator_;
  Memory mine_, theirs_;
  std::vector<PortChannel> channels_;
};

/// Half of a round trip, median, us.
double latency(Pair& pair, double seconds, const std::function<void()>& send,
               const std::function<void()>& wait) {
  std::vector<double> times;
  pair.communicator().barrier();
  // Both ranks must make the same number of rounds: the first says how many after some.
  std::uint64_t rounds = 50;
  for (int part = 0; part < 2; ++part) {
    const double begin = now_us();
    for (std::uint64_t i = 0; i < rounds; ++i) {
      const double start = now_us();
      if (pair.first()) send();
      wait();
      if (!pair.first()) send();
      if (part == 1) times.push_back((now_us() - start) / 2);
    }
    const double each = (now_us() - begin) / static_cast<double>(rounds);
    std::vector<std::uint64_t> agreed(2);
    agreed[pair.first() ? 0 : 1] =
        std::clamp<std::uint64_t>(static_cast<std::uint64_t>(seconds * 1e6 / each), 20, 200000);
    pair.communicator().all_gather(agreed.data(), 8);
    rounds = agreed[0];
  }
  return median(times);
}

/// Operations a second of the first rank, the flush at the end included.
double rate(Pair& pair, double seconds, const std::function<void()>& send) {
  pair.communicator().barrier();
  double result = 0;
  if (pair.first()) {
    for (int i = 0; i < 32; ++i) send();
    pair.channel().flush(kLong);
    std::uint64_t count = 0;
    const double start = now_us();
    while (now_us() - start < seconds * 1e6)
      for (int i = 0; i < 16; ++i, ++count) send();
    pair.channel().flush(kLong);
    result = static_cast<double>(count) / ((now_us() - start) * 1e-6);
  }
  pair.communicator().barrier();
  return result;
}

nlohmann::json measure_wire(const std::shared_ptr<Communicator>& communicator,
                            const ChannelBenchOptions& options) {
  const std::size_t most = *std::max_element(options.sizes.begin(), options.sizes.end());
  Pair pair(communicator, most + 4096);
  PortChannel& channel = pair.channel();
  const bool says = pair.first();
  nlohmann::json result;
  const std::string wire = communicator->path(1 - communicator->rank()).transport;
  result["wire"] = wire;
  result["proxies"] = CommunicatorAccess::proxies(*communicator).count();
  const auto wait = [&] { channel.wait(kLong); };
  const double signal = latency(
      pair, options.seconds, [&] { channel.signal(); }, wait);
  std::uint64_t adds = 0;
  const double add = latency(
      pair, options.seconds, [&] { channel.atomic_add(pair.add()); },
      [&] {
        for (++adds; pair.word() < adds;) std::this_thread::yield();
      });
  const double signals = rate(pair, options.seconds, [&] { channel.signal(); });
  const double add_rate = rate(pair, options.seconds, [&] { channel.atomic_add(pair.add()); });
  result["signal"] = {{"latency_us", signal}, {"per_second", signals}};
  result["atomic_add"] = {{"latency_us", add}, {"per_second", add_rate}};
  if (says) {
    fmt::print("{:<9} signal               {:>9.2f} us {:>10.0f} /s\n", wire, signal, signals);
    fmt::print("{:<9} atomic_add           {:>9.2f} us {:>10.0f} /s\n", wire, add, add_rate);
  }
  // The first rank's signals of the rate were not waited for: the second catches up by itself.
  Pair fresh(communicator, most + 4096);
  for (std::size_t bytes : options.sizes) {
    PortChannel& c = fresh.channel();
    const double together = latency(
        fresh, options.seconds, [&] { c.put_with_signal(fresh.put(bytes)); },
        [&] { c.wait(kLong); });
    const double puts = rate(fresh, options.seconds, [&] { c.put(fresh.put(bytes)); });
    const double mb = puts * static_cast<double>(bytes) / 1e6;
    result["put"].push_back({{"bytes", bytes},
                             {"put_with_signal_latency_us", together},
                             {"per_second", puts},
                             {"mb_per_second", mb}});
    if (says)
      fmt::print("{:<9} put {:>9} B      {:>9.2f} us {:>10.0f} /s {:>10.1f} MB/s\n", wire, bytes,
                 together, puts, mb);
  }
  std::fflush(stdout);
  return result;
}

/// Does nothing, so that the queue alone is measured.
class NullCarrier final : public Carrier {
 public:
  void carry(const Cargo&) override {}
  void flush(const FlushMark& mark) override { release_mark(mark); }
};

/// Queues with a producer each, by number of proxies.
nlohmann::json measure_queue(int shards, double seconds) {
  const auto communicator = Communicator::create(bootstrap_in_process(1).front());
  const MemoryTable& memories = CommunicatorAccess::memories(*communicator);
  std::vector<std::unique_ptr<Proxies>> sets;
  for (int i = 0; i < shards; ++i) {
    Proxies::Setting setting;
    setting.communicator = communicator.get();
    setting.memories = &memories;
    setting.mapped = [](int) { return std::make_unique<NullCarrier>(); };
    sets.push_back(std::make_unique<Proxies>(std::move(setting)));
  }
  const auto context = [&] {
    return WaitContext{communicator.get(), Deadline::after(kLong), "bench channel", 100000};
  };
  std::atomic<std::uint64_t> pushed{0};
  const double start = now_us();
  std::vector<std::thread> producers;
  for (auto& proxies : sets)
    producers.emplace_back([&, set = proxies.get()] {
      Trigger trigger;
      trigger.operation = Operation::atomic_add;
      std::uint64_t count = 0;
      while (now_us() - start < seconds * 1e6)
        for (int i = 0; i < 64; ++i, ++count) set->push(set->connection(0), trigger, context());
      set->flush(set->connection(0), context());
      pushed += count;
    });
  for (std::thread& producer : producers) producer.join();
  const double rate = static_cast<double>(pushed) / ((now_us() - start) * 1e-6);
  std::vector<double> times;
  const double until = now_us() + seconds * 1e6;
  while (now_us() < until) {
    const double begin = now_us();
    sets[0]->flush(sets[0]->connection(0), context());
    times.push_back(now_us() - begin);
  }
  fmt::print("queue     {} {:<19}{:>8.2f} us {:>10.0f} /s\n", shards,
             shards == 1 ? "proxy" : "proxies", median(times), rate);
  return {{"proxies", shards}, {"push_to_seen_us", median(times)}, {"per_second", rate}};
}

/// Share of a core that the process takes with its proxies idle, after the second in which they
/// stay awake.
nlohmann::json measure_idle() {
  const auto communicator = Communicator::create(bootstrap_in_process(1).front());
  CommunicatorAccess::proxies(*communicator);
  std::this_thread::sleep_for(std::chrono::milliseconds(1300));
  const auto used = [] {
    rusage usage{};
    ::getrusage(RUSAGE_SELF, &usage);
    return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1e6 +
           static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
  };
  const double cpu = used(), wall = now_us();
  std::this_thread::sleep_for(std::chrono::seconds(2));
  const double share = (used() - cpu) / (now_us() - wall);
  Proxies& proxies = CommunicatorAccess::proxies(*communicator);
  std::vector<double> seen;
  for (int i = 0; i < 3; ++i) {
    if (i > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1300));
    const double start = now_us();
    proxies.flush(proxies.connection(0), {communicator.get(), Deadline::after(kLong), "bench", 0});
    seen.push_back(now_us() - start);
  }
  fmt::print("idle      proxies take {:.2f}% of a core; a push to one is seen after {:.0f} us\n",
             share * 100, median(seen));
  return {{"core_share", share}, {"push_to_seen_us", median(seen)}};
}

nlohmann::json compare_with_ucx(const ChannelBenchOptions& options) {
  nlohmann::json result = nlohmann::json::array();
  for (std::size_t bytes : options.sizes) {
    const UcxPerftest peer = run_ucx_perftest(bytes);
    if (!peer.why_not.empty()) {
      fmt::print("ucx_perftest: {}\n", peer.why_not);
      return {{"why_not", peer.why_not}};
    }
    fmt::print("ucx_perftest, lo, {:>8} B: put {:>8.1f} MB/s, am {:>8.1f} MB/s\n", bytes,
               peer.put_mb_s, peer.am_mb_s);
    result.push_back({{"bytes", bytes},
                      {"put_mb_per_second", peer.put_mb_s},
                      {"am_mb_per_second", peer.am_mb_s}});
  }
  return result;
}

void write(const std::string& file, const nlohmann::json& result) {
  if (!file.empty()) std::ofstream(file) << result.dump(1) << "\n";
}

/// A rank of a job that a launcher, or this command, has started.
int run_rank(const ChannelBenchOptions& options) {
  CommunicatorOptions job;
  if (options.wire == "ucx") job.network_pairs = "all";
  const auto communicator = Communicator::from_environment(job);
  if (communicator->size() != 2)
    throw std::invalid_argument(
        fmt::format("bench channel is for two ranks; this job has {}", communicator->size()));
  const nlohmann::json result = measure_wire(communicator, options);
  communicator->barrier();
  if (communicator->rank() == 0) write(options.json, result);
  return 0;
}

}  // namespace

int run_bench_channel(const ChannelBenchOptions& options, const std::vector<std::string>& command) {
  if (Env::get().rank) return run_rank(options);
  nlohmann::json all;
  fmt::print(
      "# expertwire bench channel: two ranks of this machine; half of a round trip (median), "
      "operations of one thread, flush included\n");
  const auto wanted = [&](const char* wire) {
    return options.wire.empty() || options.wire == wire;
  };
  if (wanted("loopback"))
    run_in_process(2, [&](std::shared_ptr<Bootstrap> bootstrap) {
      const bool first = bootstrap->rank() == 0;
      const auto result = measure_wire(Communicator::create(std::move(bootstrap)), options);
      if (first) all["wires"].push_back(result);
    });
  std::fflush(stdout);
  for (const char* wire : {"shm", "ucx"}) {
    if (!wanted(wire)) continue;
    if (wire == std::string("ucx") && !ucx_presence().present) {
      fmt::print("ucx: {}\n", ucx_presence().why_not);
      continue;
    }
    std::vector<std::string> rank = command;
    rank.insert(rank.end(), {"--wire", wire});
    const std::string part = options.json.empty() ? "" : options.json + "." + wire;
    if (!part.empty()) rank.insert(rank.end(), {"--json", part});
    if (const int status = launch({2, rank}); status != 0) return status;
    if (part.empty()) continue;
    all["wires"].push_back(nlohmann::json::parse(std::ifstream(part)));
    std::remove(part.c_str());
  }
  if (wanted("ucx") && ucx_presence().present) all["ucx_perftest"] = compare_with_ucx(options);
  if (options.wire.empty()) {
    for (int shards : {1, 2, 4}) all["queue"].push_back(measure_queue(shards, options.seconds));
    all["idle"] = measure_idle();
  }
  write(options.json, all);
  return 0;
}

}  // namespace expertwire::tools
