#pragma once

#include <cstdint>
#include <vector>

#include "expertwire/tensor.hpp"
#include "expertwire/topology.hpp"

namespace expertwire::inline v0 {

struct DispatchLayoutRequest {
  ConstTensorView topk_idx;            ///< [T, K] int32 or int64 on the host; -1 = no selection
  int experts = 0;                     ///< E; a multiple of `ranks`
  int ranks = 1;                       ///< R
  const Topology* topology = nullptr;  ///< for nodes; without one every rank is on node 0
};

struct DispatchLayout {
  std::vector<std::int32_t> tokens_per_rank;    ///< [R] tokens with a selection there, each once
  std::vector<std::int32_t> tokens_per_node;    ///< [N] the same for nodes
  std::vector<std::int32_t> tokens_per_expert;  ///< [E] selections
  std::vector<std::uint8_t> is_token_in_rank;   ///< [T, R] 0 or 1
  std::int64_t invalid_ids = 0;                 ///< ids out of range; they count as -1
};

/// Counts where tokens go. Local, sends nothing.
DispatchLayout dispatch_layout(const DispatchLayoutRequest& request);

}  // namespace expertwire
