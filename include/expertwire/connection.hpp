#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "expertwire/deadline.hpp"
#include "expertwire/memory.hpp"

namespace expertwire::inline v0 {

/// Copies `bytes` from this rank's memory into the peer's. Offsets count from the start of the
/// memories; ranges must lie inside them. No alignment is asked for; 16 bytes is fastest.
struct PutRequest {
  Memory destination;  ///< memory of the peer
  std::uint64_t destination_offset = 0;
  Memory source;  ///< memory of this rank
  std::uint64_t source_offset = 0;
  std::uint64_t bytes = 0;
};

/// Sets a 64-bit word of the peer's memory, 8-byte aligned, to an absolute value. A word has one
/// writer.
struct SignalRequest {
  Memory destination;
  std::uint64_t destination_offset = 0;
  std::uint64_t value = 0;
};

/// Adds to a signed 64-bit word of the peer's memory, 8-byte aligned; it wraps as two's complement.
/// Any rank may add to the same word.
struct AtomicAddRequest {
  Memory destination;
  std::uint64_t destination_offset = 0;
  std::int64_t value = 0;
};

/// How this rank writes to one peer. One connection a peer, made with the communicator.
///
/// Ordering: a `signal` or `atomic_add` becomes visible to an acquiring reader at the peer only
/// after every `put` that the same thread issued on this connection before it. Puts have no order
/// among themselves, and nothing is promised across connections.
///
/// Completion: when a call returns, the source of a put may be changed only after `flush`. After
/// `flush` returns, everything issued before is in the peer's memory.
///
/// Calls may come from several threads. Arguments out of range throw `Error{invalid_argument}`
/// before anything is written.
class Connection {
 public:
  Connection() = default;
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;
  virtual ~Connection() = default;

  virtual int peer() const noexcept = 0;
  /// "loopback", "shm", ...
  virtual std::string_view transport() const noexcept = 0;

  void put(const PutRequest& request);
  void signal(const SignalRequest& request);
  /// The same as put, then signal, in one message where the wire allows it.
  void put_with_signal(const PutRequest& put, const SignalRequest& signal);
  void atomic_add(const AtomicAddRequest& request);
  /// Throws `Error{timeout}` if the wire is not done at the deadline.
  void flush(Deadline deadline);

 protected:
  virtual void do_put(const PutRequest& request) = 0;
  virtual void do_signal(const SignalRequest& request) = 0;
  virtual void do_put_with_signal(const PutRequest& put, const SignalRequest& signal);
  virtual void do_atomic_add(const AtomicAddRequest& request) = 0;
  virtual void do_flush(Deadline deadline) = 0;
};

}  // namespace expertwire
