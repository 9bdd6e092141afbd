#pragma once

#include <memory>
#include <string>
#include <vector>

#include "comm/handshake.hpp"

namespace expertwire::inline v0 {

/// Local sockets to the ranks that are other processes of this host. They carry descriptors when
/// the communicator is made; after that their only use is that the kernel closes them when a
/// process ends, however it ends, so that a death is found at once (see Watcher).
class Links {
 public:
  enum class State { connected, left, died };

  /// Opens the listener; `address()` goes to the peers.
  explicit Links(int rank);
  const std::string& address() const { return address_; }

  /// Connects this rank with `peers` (rank and address), each proving that it holds `secret`.
  struct Peer {
    int rank;
    std::string address;
  };
  void connect(const std::vector<Peer>& peers, const std::string& secret, int size,
               Deadline deadline);

  /// Sends `mine` to every linked rank and receives theirs; element i is rank i's, or empty.
  std::vector<Fd> exchange(const Fd& mine, Deadline deadline);

  /// The state of the link to `rank`, asked now; `connected` where there is none.
  State state(int rank);
  /// The socket to `rank`, to sleep on; -1 where there is none.
  int socket(int rank) const;

  /// Tells all linked ranks that this one leaves in good order.
  void say_goodbye() noexcept;

 private:
  struct Link {
    Fd socket;
    State state = State::connected;
  };

  int rank_;
  std::string address_;
  Fd listener_;
  std::vector<Link> links_;  // by rank
};

}  // namespace expertwire
