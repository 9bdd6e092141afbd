#pragma once

#include <cstdint>

#include "expertwire/fifo.hpp"

namespace expertwire::inline v0 {

// What travels between the proxies of two ranks: a head, records, then the bytes of the puts among
// them, in their order. Fields are as in memory: ranks of a job run on one kind of machine.

enum class MessageKind : std::uint32_t {
  records = 1,  ///< puts, stores and adds; has a sequence number of its own
  note = 2,     ///< nothing but the head: a heartbeat, a question, or an answer
  goodbye = 3,  ///< nothing follows
};

struct MessageHead {
  std::uint64_t job;       ///< messages of other jobs are dropped
  std::uint64_t sequence;  ///< of this message, from 1; of a note: of the last one before it
  std::uint64_t applied;   ///< what the sender has applied: all up to this sequence number
  std::int32_t source;     ///< rank of the sender
  MessageKind kind;
  std::uint32_t records;
  std::uint32_t wants_answer;  ///< 1: a note is wanted once everything up to `sequence` is applied
};
static_assert(sizeof(MessageHead) == 40);

struct MessageRecord {
  std::uint64_t offset;  ///< in the memory
  std::uint64_t value;   ///< bytes of a put; value of a store or an add
  std::uint32_t memory;  ///< number by which the receiver knows it
  Operation operation;   ///< put, store or atomic_add
};
static_assert(sizeof(MessageRecord) == 24);

inline constexpr std::uint32_t kMostRecords = 64;

}  // namespace expertwire
