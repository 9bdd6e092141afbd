#pragma once

// Which rank a selection goes to, and which row it gets there. Shared by host and device.

#include <cstdint>

#include "ep/protocol/divider.hpp"
#include "expertwire/host_device.hpp"

namespace expertwire::inline v0::ep {

/// Selections of a token; kernels give each a lane of a warp.
inline constexpr int kMostTopK = 32;

/// Which rank holds which experts: rank r holds experts r*L to (r+1)*L - 1, L = E / R.
struct Placement {
  std::int32_t ranks = 1;
  std::int32_t experts = 1;
  std::int32_t local = 1;  ///< L
  Divider by_local;

  constexpr Placement() = default;
  constexpr Placement(std::int32_t r, std::int32_t e)
      : ranks(r), experts(e), local(e / r), by_local(e / r) {}
  EXPERTWIRE_HOST_DEVICE std::int32_t local_experts() const { return local; }
  EXPERTWIRE_HOST_DEVICE std::int32_t rank_of(std::int32_t expert) const {
    return by_local.quotient(expert);
  }
  EXPERTWIRE_HOST_DEVICE std::int32_t local_index(std::int32_t expert) const {
    return by_local.rest(expert);
  }
};

/// A row of a token at one rank.
struct Destination {
  std::int32_t rank;  ///< -1 ends a token's list
  std::int32_t row;   ///< index among the rows that this rank sends to `rank`, in token order
};
static_assert(sizeof(Destination) == 8);

/// The rows of one source in an expert's output. As one int64, rows are its low half.
struct SourceRange {
  std::int32_t rows;
  std::int32_t first;
};
static_assert(sizeof(SourceRange) == 8);

/// `topk_idx` as the caller gave it: 32 or 64 bits a selection, low word first.
struct ExpertIds {
  const void* data = nullptr;
  bool wide = false;

  /// Selection `i`, or -1 if it is "no selection" or out of range; `valid` tells the two apart.
  EXPERTWIRE_HOST_DEVICE std::int32_t at(std::int64_t i, std::int32_t experts, bool* valid) const {
    // One path for both widths: the low word, and the high one or the sign in its place.
    const auto* words = static_cast<const std::int32_t*>(data);
    const std::int32_t low = words[wide ? 2 * i : i];
    const std::int32_t high = wide ? words[2 * i + 1] : low >> 31;
    *valid = high == low >> 31 && low >= -1 && low < experts;
    return *valid ? low : -1;
  }
};

/// Visits the distinct ranks of one token in top-k order: `visit(k, rank)` with the first selection
/// k that goes there. Linear in K: `last_token[rank]` remembers the token that went there last.
template <class Visit>
EXPERTWIRE_HOST_DEVICE void for_each_rank(const std::int32_t* experts, int top_k,
                                          const Placement& placement, std::int32_t token,
                                          std::int32_t* last_token, Visit visit) {
  for (int k = 0; k < top_k; ++k) {
    if (experts[k] < 0) continue;
    const std::int32_t rank = placement.rank_of(experts[k]);
    if (last_token[rank] == token) continue;
    last_token[rank] = token;
    visit(k, rank);
  }
}

/// Puts a token's destinations in ascending order of rank: the order in which combine adds.
EXPERTWIRE_HOST_DEVICE inline void sort_by_rank(Destination* list, int count) {
  for (int i = 1; i < count; ++i) {
    const Destination moving = list[i];
    int j = i;
    for (; j > 0 && list[j - 1].rank > moving.rank; --j) list[j] = list[j - 1];
    list[j] = moving;
  }
}

}  // namespace expertwire::ep
