#pragma once

#include <utility>
#include <vector>

#include "ep/cpu/peer.hpp"
#include "ep/protocol/ring.hpp"

namespace expertwire::inline v0::ep::cpu {

/// Rows that pass the ring to each rank, and that from each, in one operation; none for this one.
struct RingRows {
  std::vector<std::int64_t> to, from;
};

/// The rings in one operation, seen from one rank; the i-th frame of a ring is the
/// i-th row that passes it in this operation. See ep/protocol/ring.hpp.
template <class Slots>
class Rings {
 public:
  Rings(const LaneMemory<Slots>& memory, const RingSlots& place, RingRows rows)
      : memory_(memory), place_(place), rows_(std::move(rows)) {
    for (int peer = 0; peer < memory.size(); ++peer) {
      const RingWords last = *words(peer);
      first_.push_back({last.written + 1, last.read + 1});
    }
  }

  const RingRows& rows() const { return rows_; }

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

  /// The operation has ended: all rows have passed.
  void advance() const {
    for (int peer = 0; peer < memory_.size(); ++peer) {
      const auto p = static_cast<std::size_t>(peer);
      words(peer)->written += static_cast<Epoch>(rows_.to[p]);
      words(peer)->read += static_cast<Epoch>(rows_.from[p]);
    }
  }

 private:
  RingWords* words(int peer) const {
    return memory_.template there<RingWords>(memory_.rank(), place_.words_of(peer));
  }
  Epoch written(int peer, std::int64_t i) const {
    return first_[static_cast<std::size_t>(peer)].written + static_cast<Epoch>(i);
  }
  Epoch read(int source, std::int64_t i) const {
    return first_[static_cast<std::size_t>(source)].read + static_cast<Epoch>(i);
  }

  const LaneMemory<Slots>& memory_;
  RingSlots place_;
  RingRows rows_;
  std::vector<RingWords> first_;  // frames of this operation
};

/// What a role stands at.
struct Standing {
  int peer;
  std::int64_t row;
};

/// The rows that one worker serves: every W-th of each ring, from whichever ring can move.
class Served {
 public:
  Served(const std::vector<std::int64_t>& rows, int worker, int workers)
      : rows_(rows), next_(rows.size(), worker), workers_(workers) {}

  bool done() const { return waits_for().peer < 0; }
  Standing waits_for() const {
    for (std::size_t peer = 0; peer < rows_.size(); ++peer)
      if (next_[peer] < rows_[peer]) return {static_cast<int>(peer), next_[peer]};
    return {-1, 0};
  }
  /// Moves all rows that can, in the order of their rings; ranks begin behind `self`, this one.
  template <class CanMove, class Move>
  bool step(int self, CanMove can_move, Move move) {
    bool moved = false;
    for_each_peer(self, static_cast<int>(rows_.size()), [&](int peer) {
      const auto p = static_cast<std::size_t>(peer);
      for (; next_[p] < rows_[p] && can_move(peer, next_[p]); next_[p] += workers_) {
        move(peer, next_[p]);
        moved = true;
      }
    });
    return moved;
  }

 private:
  const std::vector<std::int64_t>& rows_;
  std::vector<std::int64_t> next_;
  int workers_;
};

/// Two roles that one worker has at once: takes steps of either until both are done. `step()` does
/// what can be done now and says whether that was anything; `done()` whether nothing is left;
/// `waits_for()` at which peer, and which of its rows, the last step stopped.
template <class First, class Second>
void run_both(First& first, Second& second, Phase phase, const WaitContext& context) {
  while (!first.done() || !second.done()) {
    const bool moved = first.step();
    if (second.step() || moved) continue;
    const Standing at = second.done() ? first.waits_for() : second.waits_for();
    // While nothing moves it may come to stand at another peer, which is then waited for.
    WaitContext patience = context;
    patience.deadline = Deadline::after(context.deadline.budget());  // of every wait, not of all
    wait_until(patience, at.peer, phase, static_cast<std::uint64_t>(at.row), [&] {
      const bool moves = first.step();
      if (second.step() || moves) return true;
      const Standing now = second.done() ? first.waits_for() : second.waits_for();
      return now.peer != at.peer;
    });
  }
}

}  // namespace expertwire::ep::cpu
