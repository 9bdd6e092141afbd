#pragma once

#include <vector>

#include "ep/cpu/peer.hpp"
#include "ep/protocol/ring.hpp"

namespace expertwire::inline v0::ep::cpu {

/// The rings in one operation, seen from one rank; the i-th frame of a ring is the
/// i-th row that passes it in this operation. See ep/protocol/ring.hpp.
template <class Slots>
class Rings {
 public:
  Rings(const LaneMemory<Slots>& memory, const RingSlots& place) : memory_(memory), place_(place) {
    for (int peer = 0; peer < memory.size(); ++peer) first_.push_back(*words(peer));
  }

  /// Whether frame `i` to `peer` may be written.
  bool has_room(int peer, std::int64_t i) const {
    const Epoch frame = written(peer, i);
    return ep::has_room<HostAccess>(memory_.template inbox<Epoch>(peer, place_.taken_of(frame)),
                                    frame, place_.frames);
  }
  std::byte* frame_to(int peer, std::int64_t i) const {
    return memory_.template outbox<std::byte>(peer, place_.frame_of(written(peer, i)));
  }
  /// Frame `i` to `peer` has been written.
  void announce(int peer, std::int64_t i) const {
    const Epoch frame = written(peer, i);
    memory_.announce(peer, place_.arrived_of(frame), frame);
  }

  /// Whether frame `i` from `source` is there.
  bool has_come(int source, std::int64_t i) const {
    const Epoch frame = read(source, i);
    return arrived<HostAccess>(memory_.template inbox<Epoch>(source, place_.arrived_of(frame)),
                               frame);
  }
  const std::byte* frame_from(int source, std::int64_t i) const {
    return memory_.template inbox<std::byte>(source, place_.frame_of(read(source, i)));
  }
  /// Frame `i` from `source` has been read.
  void give_back(int source, std::int64_t i) const {
    const Epoch frame = read(source, i);
    ep::give_back<HostAccess>(memory_.template outbox<Epoch>(source, place_.taken_of(frame)),
                              frame);
  }

  /// The operation has ended: so many frames have passed to and from `peer`.
  void advance(int peer, std::int64_t to, std::int64_t from) const {
    words(peer)->written += static_cast<Epoch>(to);
    words(peer)->read += static_cast<Epoch>(from);
  }

 private:
  RingWords* words(int peer) const {
    return memory_.template there<RingWords>(memory_.rank(), place_.words_of(peer));
  }
  Epoch written(int peer, std::int64_t i) const {
    return first_[static_cast<std::size_t>(peer)].written + 1 + static_cast<Epoch>(i);
  }
  Epoch read(int source, std::int64_t i) const {
    return first_[static_cast<std::size_t>(source)].read + 1 + static_cast<Epoch>(i);
  }

  const LaneMemory<Slots>& memory_;
  RingSlots place_;
  std::vector<RingWords> first_;  // the last frames of the operations before
};

/// What a role stands at.
struct Standing {
  int peer;
  std::int64_t row;
};

/// Two roles that one worker has at once: takes steps of either until both are done. `step()` does
/// what can be done now and says whether that was anything; `done()` whether nothing is left;
/// `waits_for()` at which peer, and which of its rows, the last step stopped.
template <class First, class Second>
void run_both(First& first, Second& second, Phase phase, const WaitContext& context) {
  while (!first.done() || !second.done()) {
    const bool moved = first.step();
    if (second.step() || moved) continue;
    Standing at = second.done() ? first.waits_for() : second.waits_for();
    // While nothing moves it may come to stand at another peer, which is then waited for.
    wait_until(context, at.peer, phase, static_cast<std::uint64_t>(at.row), [&] {
      const bool moves = first.step();
      if (second.step() || moves) return true;
      const Standing now = second.done() ? first.waits_for() : second.waits_for();
      return now.peer != at.peer;
    });
  }
}

}  // namespace expertwire::ep::cpu
