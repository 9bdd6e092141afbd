#include "ep/protocol/call.hpp"

#include <fmt/format.h>

#include "base/env.hpp"
#include "ep/protocol/row_format.hpp"

namespace expertwire::inline v0::ep {

namespace {

constexpr const char* kSameCalls = "all ranks make the same calls in the same order";

std::string describe_options(std::int32_t theirs, std::int32_t ours, int peer, int rank) {
  const std::int32_t differ = theirs ^ ours;
  const auto say = [&](int option, const char* with, const char* without, const char* rule) {
    const bool has = (theirs & option) != 0;
    return fmt::format("rank {} {} and rank {} {}; {}", peer, has ? with : without, rank,
                       has ? without : with, rule);
  };
  if ((differ & Call::kCached) != 0)
    return say(Call::kCached, "takes the routing of an earlier dispatch", "sends a new routing",
               "all ranks do the same");
  if ((differ & Call::kCapacity) != 0)
    return say(Call::kCapacity, "gave a capacity", "gave none", "all ranks give one, or none");
  if ((differ & Call::kPool) != 0)
    return say(Call::kPool, "leaves rows in its pool", "owns its output", "all ranks do the same");
  if ((differ & Call::kGrouped) != 0)
    return say(Call::kGrouped, "has layout expert_major", "token_major", "all ranks have the same");
  return say(Call::kWeights, "gave topk_weights to combine", "gave none",
             "all ranks that have tokens give them, or none does");
}

std::string describe_kind(const Mismatch& m, int peer, int rank) {
  const auto options = [](std::int32_t word) { return word & 0xFF; };
  const auto format = [](std::int32_t word) {
    return to_string(RowFormat::dtype_of(word >> 8 & 0xFF));
  };
  if (!Call::agree(Call::kKind, options(m.theirs), options(m.ours)))
    return describe_options(options(m.theirs), options(m.ours), peer, rank);
  if (format(m.theirs) != format(m.ours))
    return fmt::format("rank {} sends rows of {} and rank {} of {}; all ranks send the same", peer,
                       format(m.theirs), rank, format(m.ours));
  return fmt::format("rank {} takes a handle of lane {} and rank {} one of lane {}; {}", peer,
                     m.theirs >> 16, rank, m.ours >> 16, kSameCalls);
}

/// Dispatches of a lane are counted from 1.
std::uint32_t number_of(std::int32_t epoch) {
  return static_cast<Epoch>(epoch) - Env::get().first_epoch;
}

std::string describe_word(const Mismatch& m, int peer, int rank) {
  switch (m.word) {
    case Call::kKind:
      return describe_kind(m, peer, rank);
    case Call::kHidden:
      return fmt::format(
          "rank {} has rows of {} elements and rank {} of {}; all ranks have the same", peer,
          m.theirs, rank, m.ours);
    case Call::kRouting:
      return fmt::format(
          "rank {} selects {} of {} experts and rank {} {} of {}; all ranks do the same", peer,
          m.theirs >> 24, m.theirs & 0xFFFFFF, rank, m.ours >> 24, m.ours & 0xFFFFFF);
    case Call::kMaxTokens:
      return fmt::format("rank {} has max_tokens {} and rank {} {}; all ranks have the same", peer,
                         m.theirs, rank, m.ours);
    default:
      return fmt::format(
          "rank {} is at dispatch {} of the lane and rank {} at dispatch {} (counted from 1); {}, "
          "with handles of the same dispatches",
          peer, number_of(m.theirs), rank, number_of(m.ours), kSameCalls);
  }
}

}  // namespace

std::string describe(const char* operation, const Mismatch& mismatch, int peer, int rank) {
  return fmt::format("{}: {}", operation, describe_word(mismatch, peer, rank));
}

}  // namespace expertwire::ep
