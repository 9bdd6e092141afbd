#pragma once

// How kernels are cut to shape, SM budget and links: the formulas. Pure functions, tested without a
// GPU.

#include <algorithm>
#include <cstdint>

namespace expertwire::ep::cuda {

/// SMs whose plain stores fill the links of an H200: 15 reach 92% of what all 132 do.
inline constexpr int kFillingSms = 15;

/// Rows that the registers of a sending block hold: 512 threads, 8 vectors of 16 bytes each.
constexpr int rows_held(std::uint32_t row_bytes) {
  constexpr std::uint32_t kBytesAtOnce = 512 * 16, kSlots = 8;
  const std::uint32_t slots = (row_bytes + kBytesAtOnce - 1) / kBytesAtOnce;
  return static_cast<int>(std::max(1U, kSlots / slots));
}

/// How the blocks of a low-latency dispatch share the work.
struct Roles {
  int senders;         ///< blocks [0, senders) send
  int first_receiver;  ///< blocks from here on receive
};

struct RolesRequest {
  int blocks;
  int tokens;
  int rows_held;   ///< that a block's registers hold
  bool fused;      ///< the launch does both halves
  int senders = 0;  ///< asked for; 0: by formula
};

/// If a third of the blocks fill the links, they send, and the others expand rows from the first
/// moment: loads of an SM queue behind its stores to a busy wire. Blocks send no more rows than
/// they hold, if at most half of them can do that. The first block has the counts and no tokens.
/// Otherwise all do both.
constexpr Roles roles_of(const RolesRequest& r) {
  int senders = r.senders;
  if (senders == 0 && r.blocks >= 3 * kFillingSms) {
    const int holding = std::min((r.tokens + r.rows_held - 1) / r.rows_held, r.blocks / 2);
    senders = 1 + std::min(r.tokens, std::max(r.blocks / 3 - 1, holding));
  }
  if (!r.fused || senders == 0 || senders >= r.blocks) return {r.blocks, 0};
  return {senders, senders};
}

}  // namespace expertwire::ep::cuda
