#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "comm/wait.hpp"
#include "ep/front/region.hpp"
#include "ep/protocol/call.hpp"
#include "ep/protocol/lane.hpp"
#include "ep/protocol/slots.hpp"

namespace expertwire::inline v0::ep::cpu {

/// One lane's memory at all ranks, addressed through its layout, with the protocol steps that both
/// modes share.
template <class Slots>
class LaneMemory {
 public:
  LaneMemory(std::shared_ptr<Region> region, const Slots& slots, int lane)
      : slots_(slots), region_(std::move(region)) {
    for (int peer = 0; peer < size(); ++peer) peers_.push_back(region_->peer(peer, lane));
  }

  /// The places, with the sizes of the operation that runs.
  const Slots& slots() const { return slots_; }
  /// An operation of such a shape begins, in the turn of its lane.
  void use(const MoeShape& shape) { slots_ = slots_.with(slot_sizes(shape, size())); }
  int rank() const { return region_->communicator().rank(); }
  int size() const { return region_->communicator().size(); }

  // Addresses in memory of peers are made here alone, as in ep/cuda/kernel/peer.cuh.

  /// Where this rank writes for `peer`, or for itself; `offset` is of a pair.
  template <class T>
  T* outbox(int peer, std::uint64_t offset) const {
    return reinterpret_cast<T*>(at(peer).out + offset);
  }
  /// Where this rank finds what `source`, or itself, wrote for it; `offset` is of a pair.
  template <class T>
  const T* inbox(int source, std::uint64_t offset) const {
    return reinterpret_cast<const T*>(at(source).in + offset);
  }
  /// A place in the lane of a rank that is reached by load and store: in its pool, or, of this
  /// rank's own, its words.
  template <class T>
  T* there(int rank, std::uint64_t offset) const {
    return reinterpret_cast<T*>(at(rank).lane + offset);
  }
  /// Tells `peer` that what was written for it before belongs to epoch `n`.
  void announce(int peer, std::uint64_t flag, Epoch n) const {
    publish<HostAccess>(outbox<Epoch>(peer, flag), n);
  }
  /// Tells `peer` a value of an epoch: the `i`-th of the words at `words`.
  void tell(int peer, std::uint64_t words, int i, const Tagged& value) const {
    ep::tell<HostAccess>(outbox<Tagged>(peer, words) + i, value.value, value.epoch);
  }

  Direction<HostAccess> direction(const DirectionSlots& place) const {
    return {there<DirectionWords>(rank(), place.words), inbox<Epoch>(0, place.consumed()),
            region_->pairs().bytes / sizeof(Epoch)};
  }

  /// Waits until `peer` has credit for epoch `n`.
  void await_credit(const DirectionSlots& place, int peer, Epoch n,
                    const WaitContext& context) const {
    const auto lane = direction(place);
    wait_until(context, peer, Phase::credit, n, [&] { return lane.may_write(peer, n); });
  }

  /// Waits for a count that `source` tells for epoch `n`.
  std::int32_t await_count(const Tagged* word, int source, Epoch n,
                           const WaitContext& context) const {
    Tagged seen{};
    wait_until(context, source, Phase::counts, n, [&] {
      seen = HostAccess::load(word);
      return belongs_to(seen, n);
    });
    return seen.value;
  }

  /// Tells `peer` what this rank's operation `n` is about; after credit.
  void tell_call(const DirectionSlots& place, int peer, Epoch n, const Call& call,
                 Epoch dispatch) const {
    for (int i = 0; i < Call::kWords; ++i)
      tell(peer, place.header_of(n), i, {call.word(i, dispatch), n});
  }
  void tell_call(const DirectionSlots& place, Epoch n, const Call& call, Epoch dispatch) const {
    for (int peer = 0; peer < size(); ++peer) tell_call(place, peer, n, call, dispatch);
  }
  /// What `source` tells about its operation `n`.
  std::int32_t await_call(const DirectionSlots& place, int source, Epoch n, Call::Word word,
                          const WaitContext& context) const {
    return await_count(inbox<CallLine>(source, place.header_of(n))->words + word, source, n,
                       context);
  }
  /// Throws `Error{mismatch}` if the call of `source` does not belong to this rank's.
  void compare_call(const DirectionSlots& place, int source, Epoch n,
                    const WaitContext& context) const {
    for (int i = 0; i < Call::kWords; ++i) {
      const auto word = static_cast<Call::Word>(i);
      const Mismatch found{i, await_call(place, source, n, word, context),
                           await_call(place, rank(), n, word, context)};
      if (!Call::agree(i, found.theirs, found.ours))
        throw Error(ErrorCode::mismatch, describe(context.operation, found, source, rank()),
                    {rank(), source, Phase::counts});
    }
  }
  /// Compares the calls of those that rows come from now, and of the others two operations on (see
  /// ep/protocol/call.hpp). After all credit for epoch `n`.
  template <class Sends>
  void compare_calls(const DirectionSlots& place, Epoch n, Sends sends,
                     const WaitContext& context) const {
    const auto* own = inbox<CallLine>(rank(), place.header_of(n - kSlots))->words;
    const bool earlier = belongs_to(HostAccess::load(own), n - kSlots);
    for (int source = 0; source < size(); ++source) {
      if (earlier) compare_call(place, source, n - kSlots, context);
      if (sends(source)) compare_call(place, source, n, context);
    }
  }

  /// Tells every rank, also where nothing was sent, that this one has read epoch `n`.
  void grant_all(const DirectionSlots& place, Epoch n) const {
    for (int peer = 0; peer < size(); ++peer)
      grant<HostAccess>(outbox<Epoch>(peer, place.consumed()), n);
  }

 private:
  const Peer& at(int rank) const { return peers_[static_cast<std::size_t>(rank)]; }

  Slots slots_;
  std::shared_ptr<Region> region_;
  std::vector<Peer> peers_;  // by rank
};

/// The peers of a rank, starting behind itself, so that ranks do not all write to the same one.
template <class Visit>
void for_each_peer(int rank, int size, Visit visit) {
  for (int i = 1; i <= size; ++i) visit((rank + i) % size);
}

}  // namespace expertwire::ep::cpu
