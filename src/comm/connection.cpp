#include "expertwire/connection.hpp"

#include "comm/requests.hpp"

namespace expertwire::inline v0 {

void Connection::put(const PutRequest& request) {
  check_put("put", request, peer());
  do_put(request);
}

void Connection::signal(const SignalRequest& request) {
  check_word("signal", request.destination, request.destination_offset, peer());
  do_signal(request);
}

void Connection::put_with_signal(const PutRequest& put, const SignalRequest& signal) {
  check_put("put", put, peer());
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
