#include "comm/network.hpp"

#include <algorithm>
#include <cstring>

#include "base/check.hpp"
#include "comm/rank_pairs.hpp"
#include "comm/transport/transport.hpp"
#include "comm/transport/ucx/engine.hpp"

namespace expertwire::inline v0 {

namespace {

void exchange_versions(const Network::Request& request) {
  const auto rank = static_cast<std::size_t>(request.bootstrap.rank());
  std::vector<std::array<char, 16>> versions(request.endpoints.size());
  const UcxPresence& ucx = ucx_presence();
  if (ucx.present)
    std::memcpy(versions[rank].data(), ucx.version.data(),
                std::min<std::size_t>(ucx.version.size(), 15));
  request.bootstrap.all_gather(versions.data(), sizeof(versions[0]), request.deadline);
  for (std::size_t r = 0; r < versions.size(); ++r) request.endpoints[r].ucx_version = versions[r];
}

/// Why a pair goes over the network, where UCX reaches it.
std::string reason(const Endpoint& self, const Endpoint& peer, const std::string& cause) {
  const auto ucx = make_ucx_transport();
  const Reach reach = ucx ? ucx->reach(self, peer) : Reach{false, ucx_presence().why_not};
  if (!reach.possible)
    throw Error(
        ErrorCode::unsupported,
        fmt::format("no wire of this build reaches rank {} ({}; {})", peer.rank, cause, reach.why),
        {self.rank, peer.rank, Phase::setup});
  return fmt::format("{}, {}", cause, reach.why);
}

}  // namespace

Network Network::agree(const Request& request, const std::function<bool(const Endpoint&)>& mapped) {
  const std::size_t ranks = request.endpoints.size();
  const auto mine = static_cast<std::size_t>(request.bootstrap.rank());
  exchange_versions(request);
  const RankPairs asked("network_pairs (or EXPERTWIRE_NETWORK_PAIRS)", request.pairs,
                        static_cast<int>(ranks));
  std::vector<std::uint8_t> wanted(ranks * ranks);
  std::vector<std::string> causes(ranks);
  for (std::size_t r = 0; r < ranks; ++r) {
    if (r == mine) continue;
    if (!mapped(request.endpoints[r]))
      causes[r] = "another host";
    else if (asked.has(static_cast<int>(mine), static_cast<int>(r)))
      causes[r] = "asked for by network_pairs";
    wanted[mine * ranks + r] = causes[r].empty() ? 0 : 1;
  }
  request.bootstrap.all_gather(wanted.data(), ranks, request.deadline);
  Network network;
  network.reasons.resize(ranks);
  for (const Endpoint& peer : request.endpoints)
    network.same_version.push_back(peer.ucx_version == request.endpoints[mine].ucx_version);
  bool any = false;
  for (std::size_t r = 0; r < ranks; ++r) {
    if (causes[r].empty() && wanted[r * ranks + mine] != 0)
      causes[r] = fmt::format("rank {} asks for it", r);
    if (causes[r].empty()) continue;
    network.reasons[r] = reason(request.endpoints[mine], request.endpoints[r], causes[r]);
    any = true;
  }
  if (const auto first = std::find(wanted.begin(), wanted.end(), 1); first != wanted.end()) {
    const auto at = static_cast<std::size_t>(first - wanted.begin());
    network.first_pair = std::minmax({static_cast<int>(at / ranks), static_cast<int>(at % ranks)});
  }
  if (any) network.engines = make_ucx_engines(request.engines, static_cast<int>(ranks));
  network.exchange_addresses(request);
  return network;
}

/// All addresses of all ranks: lengths first, then bytes.
void Network::exchange_addresses(const Request& request) {
  const std::size_t ranks = request.endpoints.size();
  const auto mine = static_cast<std::size_t>(request.bootstrap.rank());
  std::string all;
  for (const auto& engine : engines) {
    const std::uint64_t bytes = engine->address().size();
    all.append(reinterpret_cast<const char*>(&bytes), sizeof(bytes));
    all += engine->address();
  }
  std::vector<std::uint64_t> lengths(ranks);
  lengths[mine] = all.size();
  request.bootstrap.all_gather(lengths.data(), sizeof(std::uint64_t), request.deadline);
  const std::size_t longest = *std::max_element(lengths.begin(), lengths.end());
  std::string table(ranks * longest, '\0');
  std::memcpy(table.data() + mine * longest, all.data(), all.size());
  if (longest > 0) request.bootstrap.all_gather(table.data(), longest, request.deadline);
  addresses.resize(ranks);
  for (std::size_t r = 0; r < ranks; ++r) {
    std::string_view text(table.data() + r * longest, lengths[r]);
    while (has(static_cast<int>(r)) && text.size() > sizeof(std::uint64_t)) {
      std::uint64_t bytes = 0;
      std::memcpy(&bytes, text.data(), sizeof(bytes));
      text.remove_prefix(sizeof(bytes));
      check(bytes <= text.size(), ErrorCode::mismatch, "rank {} sent a cut-off address", r);
      addresses[r].emplace_back(text.substr(0, bytes));
      text.remove_prefix(bytes);
    }
  }
}

}  // namespace expertwire
