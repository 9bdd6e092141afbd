#include "ep/call.hpp"

#include <fmt/format.h>

#include "base/env.hpp"
#include "expertwire/dtype.hpp"

namespace expertwire::inline v0::ep {

namespace {

std::string describe_options(const Mismatch& m, int peer, int rank) {
  const std::int32_t differ = m.theirs ^ m.ours;
  const auto say = [&](int option, const char* with, const char* without, const char* rule) {
    const bool has = (m.theirs & option) != 0;
    return fmt::format("rank {} {} and rank {} {}; {}", peer, has ? with : without, rank,
                       has ? without : with, rule);
  };
  if ((differ & Call::kCached) != 0)
    return say(Call::kCached, "takes the routing of an earlier dispatch", "sends a new routing",
               "all ranks do the same");
  if ((differ & Call::kCapacity) != 0)
    return say(Call::kCapacity, "gave a capacity", "gave none", "all ranks give one, or none");
  return say(Call::kWeights, "gave topk_weights to combine", "gave none",
             "all ranks that have tokens give them, or none does");
}

/// Dispatches of a lane are counted from 1.
std::uint32_t number_of(std::int32_t epoch) {
  return static_cast<Epoch>(epoch) - Env::get().first_epoch;
}

}  // namespace

std::string describe(const char* operation, const Mismatch& m, int peer, int rank) {
  std::string what;
  switch (m.word) {
    case Call::kOptions:
      what = describe_options(m, peer, rank);
      break;
    case Call::kFormat:
      what = fmt::format("rank {} sends rows of {} and rank {} of {}; all ranks send the same",
                         peer, to_string(static_cast<DType>(m.theirs)), rank,
                         to_string(static_cast<DType>(m.ours)));
      break;
    case Call::kLane:
      what = fmt::format(
          "rank {} takes a handle of lane {} and rank {} one of lane {}; all ranks make the same "
          "calls in the same order",
          peer, m.theirs, rank, m.ours);
      break;
    default:
      what = fmt::format(
          "rank {} is at dispatch {} of the lane and rank {} at dispatch {} (counted from 1); all "
          "ranks make the same calls in the same order, with handles of the same dispatches",
          peer, number_of(m.theirs), rank, number_of(m.ours));
  }
  return fmt::format("{}: {}", operation, what);
}

}  // namespace expertwire::ep
