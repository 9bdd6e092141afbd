#pragma once

// The queue between those who want something carried to a peer, kernels or CPU threads, and the
// proxy that carries it. For host and device.
//
//     producer                                    proxy
//     --------                                    -----
//     acquire tail: is there room for head?       acquire turn == position + 1
//     claim head -> head + 1                      read the trigger
//     write the trigger                           release tail = position + 1
//     release turn = position + 1
//
// A producer claims a place only when there is room, so one that gives up at its deadline leaves no
// hole. Positions are 64 bits and run on for ever; the turn holds the position, so a place need not
// be cleared, and what it held a lap before does not count.
//
// `Access` says how words are read and written: HostFifoAccess below, a device access in
// port_channel_device.cuh, and a model in the test that walks through all interleavings.

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "expertwire/host_device.hpp"

namespace expertwire::inline v0 {

/// What a proxy does with a trigger.
enum class Operation : std::uint32_t {
  none = 0,
  put = 1,              ///< copies `bytes` from source to destination
  signal = 2,           ///< counts the peer's semaphore of the channel up
  put_with_signal = 3,  ///< put, then signal
  atomic_add = 4,       ///< adds `value` to the word at destination
  flush = 5,            ///< says when everything before it is in the peer's memory
  store = 6,            ///< sets the word at destination to `value`
  leave = 7,            ///< the channel's last: tells the peer that nothing follows
};

/// What is asked of a proxy. Memories are numbers of the communicator (Memory::id), offsets and
/// sizes bytes.
struct alignas(64) Trigger {
  std::uint64_t source_offset = 0;
  std::uint64_t destination_offset = 0;
  std::uint64_t bytes = 0;
  std::int64_t value = 0;
  std::uint32_t channel = 0;
  std::uint32_t source = 0;
  std::uint32_t destination = 0;
  Operation operation = Operation::none;
  std::uint64_t reserved = 0;
  std::uint64_t turn = 0;  ///< written last: the position, counted from 1
};
static_assert(sizeof(Trigger) == 64);

/// Where a queue lies. `slots` and `tail` are host memory, which kernels write and read as well;
/// `head` and `tail_seen` are memory of the producers: atomics between a GPU and the host are not
/// to be had everywhere, so a queue has producers of one kind.
struct FifoView {
  Trigger* slots = nullptr;
  std::uint64_t* head = nullptr;       ///< the next position to be claimed
  std::uint64_t* tail = nullptr;       ///< positions below it have been read
  std::uint64_t* tail_seen = nullptr;  ///< what a producer has last seen of it
  std::uint64_t capacity = 0;          ///< a power of two

  EXPERTWIRE_HOST_DEVICE Trigger* slot(std::uint64_t position) const {
    return slots + (position & (capacity - 1));
  }
};

/// Parts of the protocol, which the model takes away to see that each is needed.
enum class FifoPart : std::uint8_t { none, room, turn, turn_release, tail_release };

/// Claims a place. False if the queue is full, or if another producer was quicker: try again.
template <class Access>
EXPERTWIRE_HOST_DEVICE bool claim(const FifoView& fifo, std::uint64_t* position) {
  const std::uint64_t head = Access::load(fifo.head);
  // Unsigned: a head that is older than the tail looks full, and is read anew.
  if (head - Access::acquire(fifo.tail_seen) >= fifo.capacity && !Access::removed(FifoPart::room)) {
    const std::uint64_t tail = Access::acquire(fifo.tail);
    if (head - tail >= fifo.capacity) return false;
    Access::release(fifo.tail_seen, tail, FifoPart::none);
  }
  *position = head;
  return Access::compare_exchange(fifo.head, head, head + 1);
}

/// Fills a place that was claimed, and hands it to the proxy. What this producer wrote before is
/// there when the proxy sees it.
template <class Access>
EXPERTWIRE_HOST_DEVICE void commit(const FifoView& fifo, std::uint64_t position,
                                   const Trigger& trigger) {
  Trigger* slot = fifo.slot(position);
  Access::write(slot, trigger);
  Access::release(&slot->turn, position + 1, FifoPart::turn_release);
}

/// For the proxy: whether the trigger of that position is there.
template <class Access>
EXPERTWIRE_HOST_DEVICE bool committed(const FifoView& fifo, std::uint64_t position) {
  if (Access::removed(FifoPart::turn)) return true;
  return Access::acquire(&fifo.slot(position)->turn) == position + 1;
}

/// For the proxy: what lies below `position` has been read.
template <class Access>
EXPERTWIRE_HOST_DEVICE void give_back(const FifoView& fifo, std::uint64_t position) {
  Access::release(fifo.tail, position, FifoPart::tail_release);
}

/// How CPU threads read and write the words of a queue.
struct HostFifoAccess {
  static constexpr bool removed(FifoPart) { return false; }
  static std::uint64_t load(const std::uint64_t* word) {
    return ref(word).load(std::memory_order_relaxed);
  }
  static std::uint64_t acquire(const std::uint64_t* word) {
    return ref(word).load(std::memory_order_acquire);
  }
  static void release(std::uint64_t* word, std::uint64_t value, FifoPart) {
    ref(word).store(value, std::memory_order_release);
  }
  static bool compare_exchange(std::uint64_t* word, std::uint64_t expected, std::uint64_t value) {
    return ref(word).compare_exchange_strong(expected, value, std::memory_order_relaxed);
  }
  /// All but the turn.
  static void write(Trigger* slot, const Trigger& trigger) {
    slot->source_offset = trigger.source_offset;
    slot->destination_offset = trigger.destination_offset;
    slot->bytes = trigger.bytes;
    slot->value = trigger.value;
    slot->channel = trigger.channel;
    slot->source = trigger.source;
    slot->destination = trigger.destination;
    slot->operation = trigger.operation;
  }

 private:
  static std::atomic_ref<std::uint64_t> ref(const std::uint64_t* word) {
    return std::atomic_ref(*const_cast<std::uint64_t*>(word));
  }
};

}  // namespace expertwire
