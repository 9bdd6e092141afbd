#pragma once

// The protocol under every operation, for host and device.
//
// A lane is an ordered sequence of operations. It has two directions, dispatch and combine. Each
// direction has two slots of buffers, so that an operation can be sent while the one before it is
// still being read:
//
//     sender s                                receiver r
//     --------                                ----------
//     n = sent + 1                            n = received + 1
//     acquire consumed[r] >= n - 2            acquire flag == n
//     write rows into slot n % 2 of r         read slot n % 2
//     release flag = n                        release consumed[r] = n, at every peer s
//     sent = n                                received = n
//
// Why it is safe to write slot n % 2 again: the reads of n - 2 come before the release of
// `consumed = n - 2`, which the sender acquires before its first write of n. This holds for pairs
// that exchange no row, too, because credits go to every peer in every operation.
//
// Small values (counts) travel with their epoch in one word of 8 bytes, and need no flag: see
// Tagged.
//
// Why a flag cannot be mistaken: it holds the epoch and is compared with ==, so what an earlier
// operation left there does not count. Epochs are 32 bits and wrap; all words start as the epoch
// before the first.
//
// `Access` says how words are read and written: HostAccess below for CPU threads, a device access
// in kernels, and a model in the test that walks through all interleavings.

#include <atomic>
#include <cstdint>

#include "ep/protocol/faults.hpp"
#include "expertwire/host_device.hpp"

namespace expertwire::inline v0::ep {

using Epoch = std::uint32_t;

inline constexpr Epoch kSlots = 2;

/// The slot of buffers that epoch `n` uses. 2^32 is a multiple of 2, so wrapping is seamless.
EXPERTWIRE_HOST_DEVICE constexpr int slot_of(Epoch n) { return static_cast<int>(n % kSlots); }

/// Whether `value` is `target` or later; right as long as they are less than 2^31 apart.
EXPERTWIRE_HOST_DEVICE constexpr bool reached(Epoch value, Epoch target) {
  return static_cast<std::int32_t>(value - target) >= 0;
}

/// The counters of one direction; in memory of the rank that they belong to.
struct DirectionWords {
  Epoch sent;
  Epoch received;
  std::uint32_t senders_done;    // workers of this send half that have finished
  std::uint32_t receivers_done;  // the same for the receive half
};
static_assert(sizeof(DirectionWords) == 16);

/// One direction of a lane, seen from one rank.
template <class Access>
struct Direction {
  DirectionWords* words = nullptr;
  /// In this rank's memory, what rank 0 wrote: the latest epoch that it has read; and how many
  /// words further on the next rank's is.
  const Epoch* consumed = nullptr;
  std::uint64_t stride = 1;

  /// The epoch that every worker of the current send half works on. A worker reads it before it can
  /// finish; threads of a block before the barriers in front of its last step.
  EXPERTWIRE_HOST_DEVICE Epoch sending() const { return Access::load(&words->sent) + 1; }
  /// The epoch that every worker of the current receive half works on.
  EXPERTWIRE_HOST_DEVICE Epoch receiving() const { return Access::load(&words->received) + 1; }

  /// The latest epoch that `peer` has read.
  EXPERTWIRE_HOST_DEVICE Epoch credit_of(int peer) const {
    return Access::acquire(consumed + static_cast<std::uint64_t>(peer) * stride,
                           Fault::credit_acquire);
  }
  /// Whether that credit allows to write epoch `n`: what lay in its slot before has been read.
  EXPERTWIRE_HOST_DEVICE static bool allows(Epoch credit, Epoch n) {
    return reached(credit, n - kSlots) || Access::removed(Fault::credit);
  }
  /// Whether epoch `n` may be written to `peer`.
  EXPERTWIRE_HOST_DEVICE bool may_write(int peer, Epoch n) const {
    return allows(credit_of(peer), n);
  }
  /// Whether `peer` has read epoch `n` itself.
  EXPERTWIRE_HOST_DEVICE bool has_read(int peer, Epoch n) const {
    return reached(credit_of(peer), n);
  }

  /// Every worker of a half calls this after its last step; the last one advances the counter.
  EXPERTWIRE_HOST_DEVICE void finish_send(Epoch n, std::uint32_t workers) const {
    finish(&words->senders_done, &words->sent, n, workers);
  }
  EXPERTWIRE_HOST_DEVICE void finish_receive(Epoch n, std::uint32_t workers) const {
    if (last_to_receive(workers)) end_receive(n);
  }

  /// finish_receive() in two steps, for a half whose last worker has more to do: it has then seen
  /// what all others read and wrote.
  EXPERTWIRE_HOST_DEVICE bool last_to_receive(std::uint32_t workers) const {
    return Access::count_up(&words->receivers_done) + 1 == workers;
  }
  EXPERTWIRE_HOST_DEVICE void end_receive(Epoch n) const {
    Access::store(&words->receivers_done, 0);
    Access::store(&words->received, n);
  }
  /// For workers that do both halves of an operation: the last to receive ends the send half, too.
  EXPERTWIRE_HOST_DEVICE void end_send(Epoch n) const { Access::store(&words->sent, n); }

 private:
  EXPERTWIRE_HOST_DEVICE static void finish(std::uint32_t* done, Epoch* counter, Epoch n,
                                            std::uint32_t workers) {
    if (Access::count_up(done) + 1 != workers) return;
    Access::store(done, 0);
    Access::store(counter, n);
  }
};

/// Tells the owner of `flag` that everything this worker wrote before belongs to epoch `n`.
template <class Access>
EXPERTWIRE_HOST_DEVICE void publish(Epoch* flag, Epoch n) {
  Access::release(flag, n, Fault::flag_release);
}

/// Whether what `flag` guards is there for epoch `n`.
template <class Access>
EXPERTWIRE_HOST_DEVICE bool arrived(const Epoch* flag, Epoch n) {
  if (Access::removed(Fault::flag)) return true;
  return Access::acquire(flag, Fault::flag_acquire) == n;
}

/// A value that carries its epoch. Both are written by one store of 8 bytes, so it needs no flag.
struct alignas(8) Tagged {
  std::int32_t value;
  Epoch epoch;
};

/// Tells the owner of `word` a value of epoch `n`. Orders nothing else.
template <class Access>
EXPERTWIRE_HOST_DEVICE void tell(Tagged* word, std::int32_t value, Epoch n) {
  Access::store(word, Tagged{value, n});
}

/// Whether what was read from such a word has been told for epoch `n`.
EXPERTWIRE_HOST_DEVICE inline bool belongs_to(const Tagged& seen, Epoch n) {
  return seen.epoch == n;
}

/// Tells a sender, whose `consumed` word for this rank is given, that `n` has been read.
template <class Access>
EXPERTWIRE_HOST_DEVICE void grant(Epoch* consumed_at_sender, Epoch n) {
  Access::release(consumed_at_sender, n, Fault::credit_release);
}

/// The same of one frame of a ring, of which the calling worker has used all that it read.
template <class Access>
EXPERTWIRE_HOST_DEVICE void give_back(Epoch* taken_at_writer, Epoch frame) {
  Access::store_after_reads(taken_at_writer, frame, Fault::credit_release);
}

/// Words shared between CPU threads and processes.
struct HostAccess {
  static bool removed(Fault fault) { return ep::removed(fault); }

  static Epoch load(const Epoch* word) { return ref(word).load(std::memory_order_relaxed); }
  static void store(Epoch* word, Epoch value) {
    delay();
    ref(word).store(value, std::memory_order_relaxed);
  }
  static Tagged load(const Tagged* word) {
    return std::atomic_ref(*const_cast<Tagged*>(word)).load(std::memory_order_relaxed);
  }
  static void store(Tagged* word, Tagged value) {
    delay();
    std::atomic_ref(*word).store(value, std::memory_order_relaxed);
  }
  static Epoch acquire(const Epoch* word, Fault order) {
    delay();
    return ref(word).load(removed(order) ? std::memory_order_relaxed : std::memory_order_acquire);
  }
  static void release(Epoch* word, Epoch value, Fault order) {
    delay();
    ref(word).store(value, removed(order) ? std::memory_order_relaxed : std::memory_order_release);
  }
  static void store_after_reads(Epoch* word, Epoch value, Fault order) {
    release(word, value, order);
  }
  static std::uint32_t count_up(std::uint32_t* word) {
    delay();
    return ref(word).fetch_add(1, std::memory_order_acq_rel);
  }

 private:
  static std::atomic_ref<Epoch> ref(const Epoch* word) {
    return std::atomic_ref(*const_cast<Epoch*>(word));
  }
};
static_assert(std::atomic_ref<Tagged>::is_always_lock_free);

}  // namespace expertwire::ep
