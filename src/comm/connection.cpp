#include "expertwire/connection.hpp"

#include "base/check.hpp"

namespace expertwire::inline v0 {

namespace {

void check_range(const char* what, const Memory& memory, std::uint64_t offset,
                 std::uint64_t bytes) {
  check_argument(offset <= memory.bytes() && bytes <= memory.bytes() - offset,
                 "{}: bytes {} to {} lie outside the memory of rank {}, which has {}", what, offset,
                 offset + bytes, memory.rank(), memory.bytes());
}

void check_word(const char* what, const Memory& memory, std::uint64_t offset, int peer) {
  check_argument(memory.rank() == peer, "{}: the destination is memory of rank {}, not of rank {}",
                 what, memory.rank(), peer);
  // Network cards drop misaligned atomics in silence, so no transport takes them.
  check_argument(offset % sizeof(std::uint64_t) == 0,
                 "{}: destination_offset is {}; it must be a multiple of 8", what, offset);
  check_range(what, memory, offset, sizeof(std::uint64_t));
}

void check_put(const PutRequest& request, int peer) {
  check_argument(request.destination.rank() == peer,
                 "put: the destination is memory of rank {}, not of rank {}",
                 request.destination.rank(), peer);
  check_argument(request.source.data() != nullptr,
                 "put: the source must be memory that this process can read");
  check_range("put: destination", request.destination, request.destination_offset, request.bytes);
  check_range("put: source", request.source, request.source_offset, request.bytes);
}

}  // namespace

void Connection::put(const PutRequest& request) {
  check_put(request, peer());
  do_put(request);
}

void Connection::signal(const SignalRequest& request) {
  check_word("signal", request.destination, request.destination_offset, peer());
  do_signal(request);
}

void Connection::put_with_signal(const PutRequest& put, const SignalRequest& signal) {
  check_put(put, peer());
  check_word("signal", signal.destination, signal.destination_offset, peer());
  do_put_with_signal(put, signal);
}

void Connection::atomic_add(const AtomicAddRequest& request) {
  check_word("atomic_add", request.destination, request.destination_offset, peer());
  do_atomic_add(request);
}

void Connection::flush(Deadline deadline) { do_flush(deadline); }

void Connection::do_put_with_signal(const PutRequest& put, const SignalRequest& signal) {
  do_put(put);
  do_signal(signal);
}

}  // namespace expertwire
