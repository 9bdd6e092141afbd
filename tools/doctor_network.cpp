#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>

#include <filesystem>
#include <map>

#include "base/env.hpp"
#include "comm/communicator_access.hpp"
#include "comm/proxy/proxies.hpp"
#include "comm/transport/ucx/engine.hpp"
#include "doctor_findings.hpp"
#include "expertwire/port_channel.hpp"

namespace expertwire::tools {

namespace {

/// Addresses by interface, of those that are up.
std::map<std::string, std::string> interfaces() {
  std::map<std::string, std::string> found;
  ifaddrs* all = nullptr;
  if (::getifaddrs(&all) != 0) return found;
  for (const ifaddrs* i = all; i != nullptr; i = i->ifa_next) {
    if ((i->ifa_flags & IFF_UP) == 0) continue;
    std::string& text = found[i->ifa_name];
    if (i->ifa_addr == nullptr || i->ifa_addr->sa_family != AF_INET) continue;
    std::array<char, INET_ADDRSTRLEN> name{};
    ::inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(i->ifa_addr)->sin_addr, name.data(),
                name.size());
    text += (text.empty() ? "" : ", ") + std::string(name.data());
  }
  ::freeifaddrs(all);
  return found;
}

std::string rdma_devices() {
  std::string names;
  std::error_code none;
  for (std::filesystem::directory_iterator it("/sys/class/infiniband", none), end;
       !none && it != end; it.increment(none))
    names += (names.empty() ? "" : ", ") + it->path().filename().string();
  return names;
}

/// MB/s of puts from one thread rank to another.
double measure(bool network) {
  constexpr std::size_t kBytes = 57344;
  constexpr int kPuts = 2000;
  double result = 0;
  run_in_process(2, [&](std::shared_ptr<Bootstrap> bootstrap) {
    CommunicatorOptions options;
    if (network) options.network_pairs = "all";
    auto communicator = Communicator::create(std::move(bootstrap), options);
    const int peer = 1 - communicator->rank();
    const Memory mine = communicator->allocate_memory(kBytes);
    std::vector<std::array<char, 1024>> texts(2);
    std::vector<std::uint64_t> lengths(2);
    const std::string text = mine.serialize();
    const auto rank = static_cast<std::size_t>(communicator->rank());
    lengths[rank] = std::min<std::size_t>(text.size(), 1024);
    text.copy(texts[rank].data(), lengths[rank]);
    communicator->all_gather(lengths.data(), 8);
    communicator->all_gather(texts.data(), 1024);
    const Memory theirs = communicator->open_memory({texts[1 - rank].data(), lengths[1 - rank]});
    auto channels = PortChannel::open_all(communicator);
    PortChannel& channel = channels[static_cast<std::size_t>(peer)];
    if (rank == 0) {
      channel.put({theirs, 0, mine, 0, kBytes});
      channel.flush(std::chrono::seconds(10));
      const auto start = std::chrono::steady_clock::now();
      for (int i = 0; i < kPuts; ++i) channel.put({theirs, 0, mine, 0, kBytes});
      channel.flush(std::chrono::seconds(30));
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
      result = kBytes * kPuts / took.count() / 1e6;
    }
    communicator->barrier();
  });
  return result;
}

void try_wires(Findings& findings, bool network) {
  try {
    findings.fact("ports, one host", "{:.0f} MB/s, puts of 56 KB by a proxy", measure(false));
    if (network)
      findings.fact("ports, ucx",
                    "{:.0f} MB/s, the same over this machine's own network (lo, if "
                    "that is what UCX takes)",
                    measure(true));
  } catch (const std::exception& error) {
    findings.problem(error.what(), "see the message; docs/environment.md has the variables");
  }
}

}  // namespace

void examine_network(Findings& findings, bool measure_wires) {
  findings.section("Network (for ranks of several hosts)");
  for (const auto& [name, addresses] : interfaces())
    findings.fact("interface", "{}: {}", name, addresses.empty() ? "no IPv4 address" : addresses);
  const std::string rdma = rdma_devices();
  findings.fact("RDMA devices", "{}", rdma.empty() ? "none" : rdma);
  const UcxPresence& ucx = ucx_presence();
  if (ucx.present) {
    findings.fact("UCX",
                  "{}, loaded at run time; it chooses transports and devices "
                  "(UCX_TLS and UCX_NET_DEVICES narrow that)",
                  ucx.version);
    const bool on = Env::get().remote_writes == "on";
    findings.fact("way", "{}",
                  on ? "remote writes, as EXPERTWIRE_REMOTE_WRITES=on asks"
                  : rdma.empty() || Env::get().remote_writes == "off"
                      ? "messages, which the receiving proxy places"
                      : "remote writes where UCX reports rc, dc or srd (not run on RDMA so "
                        "far), else messages");
  } else {
    findings.note(
        fmt::format("no UCX: {}; ranks of one host do without, of several hosts not", ucx.why_not),
        "libucx0 of the distribution, or EXPERTWIRE_UCX=/path/to/libucp.so.0");
  }
  const RankPlace place = local_place();
  const int count =
      Env::get().proxies > 0 ? Env::get().proxies : Proxies::usual_count(place.cores, 1);
  findings.fact("proxies", "{} for a rank alone on the {} cores (EXPERTWIRE_PROXIES)", count,
                place.cores);
  if (place.cores <= count)
    findings.note("proxies share their cores with the ranks' own work",
                  "more cores, or fewer EXPERTWIRE_PROXIES");
  if (measure_wires) try_wires(findings, ucx.present);
}

}  // namespace expertwire::tools
