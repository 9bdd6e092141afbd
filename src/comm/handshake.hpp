#pragma once

#include <chrono>
#include <cstdint>
#include <list>
#include <string>
#include <vector>

#include "comm/secret.hpp"
#include "comm/socket.hpp"

namespace expertwire::inline v0 {

/// Who takes part in a handshake. Both sides must hold the same secret, size and purpose.
struct Party {
  std::string secret;
  std::string purpose;  ///< "rendezvous" or "link": a proof for one is no proof for the other
  int rank = 0;
  int size = 1;
};

/// Accepts connections and lets in those whose peer proves, by HMAC over fresh random numbers, that
/// it holds the job's secret; proves the same to the peer. Several handshakes go on at once, so a
/// stranger that says nothing delays nobody; it is dropped after two seconds.
class Acceptor {
 public:
  struct Guest {
    int rank = -1;
    Fd socket;
  };

  Acceptor(Fd listener, Party self);

  /// The next peer that proved itself; `rank` is -1 at the deadline.
  Guest next(Deadline deadline);
  /// Connections that were dropped.
  int strangers() const { return strangers_; }

 private:
  struct Hello {
    std::uint32_t magic;
    std::int32_t rank;
    std::int32_t size;
    Nonce nonce;
    Mac proof;
  };
  struct Pending {
    Fd socket;
    Nonce nonce{};
    Deadline deadline;
    Hello hello{};
    std::size_t received = 0;
  };
  friend Fd connect_authenticated(const std::string& address, const Party& self, int peer,
                                  Deadline deadline);

  void admit();
  void drop_stranger(const char* why);
  bool advance(Pending& pending, Guest& guest);
  static Mac proof(const Party& party, const char* side, int rank, const Nonce& a, const Nonce& b);

  Fd listener_;
  Party self_;
  std::list<Pending> pending_;
  int strangers_ = 0;
};

/// Connects to `peer`'s acceptor, trying again until the deadline while nobody listens. Both prove
/// themselves; the result is empty if either was not convinced.
Fd connect_authenticated(const std::string& address, const Party& self, int peer,
                         Deadline deadline);

}  // namespace expertwire
