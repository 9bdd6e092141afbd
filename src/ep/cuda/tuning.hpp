#pragma once

// How kernels are cut to shape, SM budget and links: the formulas. Pure functions, tested without a
// GPU.

#include <algorithm>
#include <cstdint>

#include "expertwire/tuning.hpp"

namespace expertwire::ep::cuda {

/// What a high-throughput dispatch has on its way: warps of a block that send, and the shared
/// memory of a block's rings, two stages a warp.
struct Sending {
  int warps;
  std::uint32_t ring_bytes;
};

struct SendingRequest {
  int blocks;
  double link_bytes_per_us;  ///< what a GPU writes to its peers
  bool owned;                ///< receivers copy rows out of the pool, with rings of their own
  std::uint32_t most_ring_bytes;
};

/// A row needs about 8 us from the start of its load to the end of its store while the wire is
/// busy, so speed * 8 us are on their way, over all blocks. More waits in queues, and then SMs that
/// get a small part of the wire end late. As many warps as have two stages of 7 KB or more, and two
/// at least. Owned output fills the rings: receivers need them as well.
constexpr Sending sending_of(const SendingRequest& r) {
  constexpr double kJourneyUs = 8;
  constexpr std::uint32_t kStageBytes = 7168, kStages = 2;
  constexpr int kFewestWarps = 2, kMostWarps = 8;
  if (r.owned) return {kMostWarps, r.most_ring_bytes};
  const double wanted = r.link_bytes_per_us * kJourneyUs / r.blocks;
  const auto ring = static_cast<std::uint32_t>(
      std::clamp(wanted, static_cast<double>(kFewestWarps * kStages * kStageBytes),
                 static_cast<double>(r.most_ring_bytes)));
  const auto warps = static_cast<int>(ring / (kStages * kStageBytes));
  return {std::clamp(warps, kFewestWarps, kMostWarps), ring};
}

/// What was asked for in place of the formula's.
constexpr Sending asked_or(const Tuning& asked, const Sending& formula) {
  return {asked.sender_warps > 0 ? asked.sender_warps : formula.warps,
          asked.ring_bytes > 0 ? static_cast<std::uint32_t>(asked.ring_bytes) : formula.ring_bytes};
}

}  // namespace expertwire::ep::cuda
