#include "comm/proxy/poller.hpp"

#include <algorithm>
#include <chrono>

#include "base/process.hpp"

namespace expertwire::inline v0 {

namespace {

constexpr std::chrono::microseconds kInterval{1000};

}  // namespace

std::shared_ptr<Poller> Poller::get() {
  static std::mutex mutex;
  static std::weak_ptr<Poller> known;
  static OwnProcess process;  // a forked child has its parent's poller without its thread
  std::lock_guard lock(mutex);
  auto poller = process.here() ? known.lock() : nullptr;
  if (!poller) known = poller = std::make_shared<Poller>();
  process = OwnProcess();
  return poller;
}

Poller::Poller() : thread_([this] { run(); }) {}

Poller::~Poller() {
  {
    std::lock_guard lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Poller::add(Client& client) {
  {
    std::lock_guard lock(mutex_);
    clients_.push_back(&client);
  }
  changed_.notify_all();
}

void Poller::remove(Client& client) {
  std::lock_guard lock(mutex_);
  std::erase(clients_, &client);
}

std::size_t Poller::clients() {
  std::lock_guard lock(mutex_);
  return clients_.size();
}

void Poller::run() {
  std::unique_lock lock(mutex_);
  while (!ending_) {
    changed_.wait(lock, [this] { return ending_ || !clients_.empty(); });
    for (Client* client : clients_)
      if (client->poll()) client->wake();
    lock.unlock();
    std::this_thread::sleep_for(kInterval);
    lock.lock();
  }
}

}  // namespace expertwire
