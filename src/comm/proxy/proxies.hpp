#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "comm/proxy/copier.hpp"
#include "comm/proxy/network_carrier.hpp"
#include "comm/proxy/proxy.hpp"
#include "expertwire/connection.hpp"

namespace expertwire::inline v0 {

/// The proxies of a communicator. Each serves the peers whose rank, modulo the number of proxies,
/// is its index; both ranks of a pair may have other numbers of them.
class Proxies {
 public:
  struct Setting {
    Communicator* communicator = nullptr;
    const MemoryTable* memories = nullptr;
    int count = 1;
    /// One a proxy, or none where no peer is behind a network.
    std::vector<std::unique_ptr<Engine>> engines;
    int device = -1;  ///< of this rank, for memory of devices; -1: the CPU backend
    /// Tests and measurements: what carries to a peer that is behind no network.
    std::function<std::unique_ptr<Carrier>(int peer)> mapped;
    /// Of the peers behind a network: addresses of their engines; empty of others.
    std::vector<std::vector<std::string>> addresses;
    std::vector<bool> same_version;  ///< by peer: its engine is what this rank's is
    std::uint64_t job = 0;
    std::chrono::milliseconds silence{5000};  ///< after which a peer is taken for dead
    std::function<void(int peer, const std::string& why, bool in_good_order)> lost;
  };

  explicit Proxies(Setting setting);
  Proxies(const Proxies&) = delete;
  Proxies& operator=(const Proxies&) = delete;
  ~Proxies();

  /// How many a rank has if nobody says so: one for every four of its cores, four at most.
  static int usual_count(int cores, int ranks_on_host);

  int count() const { return static_cast<int>(proxies_.size()); }
  Proxy& of(int peer) const { return *proxies_[static_cast<std::size_t>(peer) % proxies_.size()]; }
  ChannelTable& channels() { return channels_; }
  /// The channel of this rank's Connection to a peer: it has no semaphore.
  ChannelState& connection(int peer) const { return *connections_[static_cast<std::size_t>(peer)]; }

  /// Queues a trigger of a channel; returns its position.
  std::uint64_t push(const ChannelState& channel, Trigger trigger, const WaitContext& context);
  /// Returns once everything pushed to the channel before has arrived.
  void flush(ChannelState& channel, const WaitContext& context);
  /// Somebody waits for `peer`: from now on it is looked after. Any thread.
  void expect(int peer) noexcept;
  /// What all of them have sent over networks so far.
  struct Sent {
    std::uint64_t messages = 0, message_bytes = 0, writes = 0;
  };
  Sent sent() const;
  /// Why a proxy has stopped; none while all work.
  std::optional<Error> failure();

 private:
  void fail(const std::string& why);
  std::unique_ptr<Carrier> make_carrier(int peer);
  std::unique_ptr<Carrier> make_mapped_carrier(int peer);
  void make_clients();

  Setting setting_;
  ChannelTable channels_;
  std::vector<ChannelState*> connections_;
  std::shared_ptr<Copier> copier_;                         // null on the CPU backend
  std::vector<std::shared_ptr<NetworkSetting>> networks_;  // by proxy, as the next
  std::vector<std::unique_ptr<NetworkClient>> clients_;
  std::vector<std::unique_ptr<Carrier>> carriers_;  // by peer
  std::mutex mutex_;
  std::optional<Error> failure_;
  std::atomic<bool> failed_{false};
  std::vector<std::unique_ptr<Proxy>> proxies_;  // ends before what it uses
};

/// A put of a connection or channel, as a trigger.
Trigger put_trigger(Operation operation, const PutRequest& request);

/// A connection whose calls a proxy carries out.
std::unique_ptr<Connection> make_queued_connection(Proxies& proxies, Communicator& communicator,
                                                   int peer, std::string_view transport);

}  // namespace expertwire
