#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace expertwire::inline v0 {

/// The one thread of a process that looks, every millisecond, after all proxies that have had
/// nothing to do for a while, so that many idle proxies cost what one does.
class Poller {
 public:
  class Client {
   public:
    Client() = default;
    Client(const Client&) = delete;
    Client& operator=(const Client&) = delete;
    virtual ~Client() = default;
    /// Does a round of work; whether there was any, in which case the client is to be woken.
    virtual bool poll() noexcept = 0;
    virtual void wake() noexcept = 0;
  };

  /// That of the process; its thread ends with the last owner.
  static std::shared_ptr<Poller> get();

  Poller();
  Poller(const Poller&) = delete;
  Poller& operator=(const Poller&) = delete;
  ~Poller();

  void add(Client& client);
  /// On return the client is not being polled.
  void remove(Client& client);
  /// Clients that it looks after now.
  std::size_t clients();

 private:
  void run();

  std::mutex mutex_;  // held while clients are polled
  std::condition_variable changed_;
  std::vector<Client*> clients_;
  bool ending_ = false;
  std::thread thread_;
};

}  // namespace expertwire
