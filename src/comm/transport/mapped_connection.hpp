#pragma once

#include <atomic>
#include <cstring>
#include <string_view>

#include "expertwire/connection.hpp"

namespace expertwire::inline v0 {

/// A connection to a peer whose memory is mapped here: plain stores by the calling thread.
///
/// Ordering: a signal is a release store and an add a release add, so an acquiring reader sees the
/// puts before it. Completion: stores are in the (coherent) memory of the peer when they retire.
class MappedConnection final : public Connection {
 public:
  MappedConnection(int peer, std::string_view transport) : peer_(peer), transport_(transport) {}

  int peer() const noexcept override { return peer_; }
  std::string_view transport() const noexcept override { return transport_; }

 private:
  void do_put(const PutRequest& r) override {
    if (r.bytes > 0)
      std::memmove(r.destination.data() + r.destination_offset, r.source.data() + r.source_offset,
                   r.bytes);
  }
  void do_signal(const SignalRequest& r) override {
    auto* word = reinterpret_cast<std::uint64_t*>(r.destination.data() + r.destination_offset);
    std::atomic_ref(*word).store(r.value, std::memory_order_release);
  }
  void do_atomic_add(const AtomicAddRequest& r) override {
    auto* word = reinterpret_cast<std::uint64_t*>(r.destination.data() + r.destination_offset);
    std::atomic_ref(*word).fetch_add(static_cast<std::uint64_t>(r.value),
                                     std::memory_order_acq_rel);
  }
  void do_flush(Deadline) override {}

  int peer_;
  std::string_view transport_;
};

}  // namespace expertwire
