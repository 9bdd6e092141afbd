#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "expertwire/communicator.hpp"
#include "expertwire/deadline.hpp"

namespace expertwire::inline v0 {

/// What a wait needs besides its condition: how patient to be, and what to say when it fails.
struct WaitContext {
  Communicator* communicator = nullptr;
  Deadline deadline;
  const char* operation = "";  ///< e.g. "low-latency dispatch"
  int spins = 0;               ///< polls before the first yield; 0 when cores are shared
  const std::atomic<bool>* abandoned = nullptr;  ///< set when another thread of this rank failed
};

/// Gives up the core for a moment once a wait is long: yields at first, later sleeps.
class Patience {
 public:
  explicit Patience(const WaitContext& context) : spins_left_(context.spins) {}
  /// Call between polls. Returns true when it is time to look for trouble (rarely).
  bool pause();

 private:
  int spins_left_;
  std::uint32_t yields_ = 0;
  std::chrono::steady_clock::time_point start_{};
};

[[noreturn]] void throw_timeout(const WaitContext& context, int peer, Phase phase,
                                std::uint64_t detail);
[[noreturn]] void throw_lost(const WaitContext& context, const Error& lost, Phase phase);

[[noreturn]] void throw_abandoned(const WaitContext& context, int peer, Phase phase);

/// Polls `ready()` until it is true. `ready` must acquire what it reads. On trouble throws
/// `Error{timeout}` or `Error{peer_lost}` that names `peer`, `phase` and `detail` (an epoch or a
/// row).
template <class Ready>
void wait_until(const WaitContext& context, int peer, Phase phase, std::uint64_t detail,
                Ready ready) {
  if (ready()) [[likely]]
    return;
  Patience patience(context);
  while (!ready()) {
    if (!patience.pause()) continue;
    if (context.abandoned != nullptr && context.abandoned->load(std::memory_order_relaxed))
      throw_abandoned(context, peer, phase);
    if (auto lost = context.communicator->find_lost_peer(peer)) {
      if (ready()) return;
      throw_lost(context, *lost, phase);
    }
    if (context.deadline.expired()) throw_timeout(context, peer, phase, detail);
  }
}

}  // namespace expertwire
