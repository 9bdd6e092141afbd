#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ep/protocol/routing.hpp"

namespace expertwire::inline v0::ep {

/// Where the tokens of one rank go: the sender's half of a handle, on the host.
struct Route {
  Placement placement;
  int tokens = 0;
  int top_k = 1;
  std::vector<std::int32_t> experts;         ///< [T, K]; -1 where there is no selection
  std::vector<Destination> destinations;     ///< [T, width()], ascending ranks, -1 ends
  std::vector<std::int32_t> positions;       ///< [T, K]: index among my selections of that expert
  std::vector<std::int32_t> rows_to_rank;    ///< [R]
  std::vector<std::int32_t> rows_to_expert;  ///< [E]
  std::int64_t invalid_ids = 0;              ///< ids out of range, counted as -1
  std::int64_t first_invalid = -1;           ///< index of the first of them in [T, K]

  /// Most destinations that a token can have.
  int width() const { return std::min(top_k, static_cast<int>(placement.ranks)); }
  const Destination* destinations_of(int token) const {
    return &destinations[static_cast<std::size_t>(token) * static_cast<std::size_t>(width())];
  }
  const std::int32_t* experts_of(int token) const {
    return &experts[static_cast<std::size_t>(token) * static_cast<std::size_t>(top_k)];
  }
  const std::int32_t* positions_of(int token) const {
    return &positions[static_cast<std::size_t>(token) * static_cast<std::size_t>(top_k)];
  }
};

/// One linear pass over `topk_idx[T, K]`.
Route make_route(const ExpertIds& ids, int tokens, int top_k, const Placement& placement);

}  // namespace expertwire::ep
