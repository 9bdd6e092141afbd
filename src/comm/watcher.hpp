#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "comm/links.hpp"
#include "expertwire/error.hpp"

namespace expertwire::inline v0 {

/// A thread that looks after the peers of one communicator, so that a death is found at once
/// whatever the callers do, and whoever waits asks memory alone. It sleeps until the system says
/// that a link has closed, or until a rank of this process leaves.
class Watcher {
 public:
  /// Work that waits for peers where no thread polls, such as kernels. Called by the watcher's
  /// thread.
  class Client {
   public:
    Client() = default;
    Client(const Client&) = delete;
    Client& operator=(const Client&) = delete;
    virtual ~Client() = default;
    /// Whether it has waited for `peer` since it was last asked.
    virtual bool awaits(int peer) = 0;
    /// A peer is lost; called once.
    virtual void lose(const Error& lost) = 0;
  };

  /// How the end of one peer is seen: by its link, or, in this process, by the end of its segment.
  struct Peer {
    std::int64_t pid = 0;
    std::uint64_t segment = 0;  ///< of a rank of this process; 0: see its link
  };

  /// `links` must outlive the watcher.
  Watcher(int rank, Links& links, std::vector<Peer> peers);
  Watcher(const Watcher&) = delete;
  Watcher& operator=(const Watcher&) = delete;
  ~Watcher();

  /// A peer is found to have gone by other means than its link; `why` says how it died. Any thread.
  void report(int peer, Links::State state, const std::string& why);

  void add(Client& client);
  /// On return `client` is not being called, and never will be.
  void remove(Client& client);

  /// See Communicator::find_lost_peer.
  std::optional<Error> find_lost(int awaited) const;

 private:
  using State = Links::State;
  struct Watched {
    Client* client;
    std::vector<int> looks_in_vain;  // by peer: looks in a row at which it was awaited though gone
    bool told = false;
  };

  void run();
  void sleep(bool again_soon);
  bool look();
  State look_at(std::size_t peer);
  void note(std::size_t peer, State now, const std::string& why);
  void tell_clients();
  std::optional<Error> find_dead() const;
  Error left(int peer) const;
  State state(std::size_t peer) const { return states_[peer].load(std::memory_order_acquire); }

  int rank_;
  Links& links_;
  std::vector<Peer> peers_;
  std::unique_ptr<std::atomic<State>[]> states_;  // by peer, as the next
  std::vector<std::string> reasons_;              // written before the state, once
  std::atomic<int> gone_{0};                      // peers that are not connected any more
  std::shared_ptr<Fd> wake_;
  std::atomic<bool> ending_{false};
  std::mutex mutex_;
  std::vector<Watched> clients_;  // guarded by mutex_
  std::thread thread_;
};

}  // namespace expertwire
