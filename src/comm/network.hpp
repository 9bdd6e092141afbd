#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "comm/endpoint.hpp"
#include "comm/proxy/engine.hpp"
#include "expertwire/bootstrap.hpp"

namespace expertwire::inline v0 {

/// Which ranks this one reaches over a network, and what the network needs for that. Endpoints are
/// connected later, by the first message, from either side.
struct Network {
  struct Request {
    Bootstrap& bootstrap;
    std::vector<Endpoint>& endpoints;  ///< gets the versions of UCX
    const std::string& pairs;          ///< that are to go over the network
    int engines;                       ///< of this rank
    Deadline deadline;
  };

  std::vector<std::string> reasons;                 ///< by rank; empty: not over a network
  std::vector<std::vector<std::string>> addresses;  ///< by rank, of its engines; empty as above
  std::vector<bool> same_version;                   ///< by rank: of the engine
  std::vector<std::unique_ptr<Engine>> engines;     ///< none if no rank is reached by them
  std::optional<std::pair<int, int>> first_pair;    ///< the same on all ranks

  /// Collective. A pair goes over the network if `mapped` says that there is no other way, or if
  /// one of its ranks asks for it. Throws `Error{unsupported}` naming the rank that has no UCX.
  static Network agree(const Request& request, const std::function<bool(const Endpoint&)>& mapped);

  bool present() const { return !engines.empty(); }
  bool has(int rank) const {
    const auto r = static_cast<std::size_t>(rank);
    return r < reasons.size() && !reasons[r].empty();
  }
  std::string why(int rank) const { return reasons[static_cast<std::size_t>(rank)]; }

 private:
  void exchange_addresses(const Request& request);
};

}  // namespace expertwire
