#include "comm/watcher.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "base/check.hpp"
#include "comm/segment.hpp"

namespace expertwire::inline v0 {

namespace {

/// Between two looks at clients that may wait for a peer that has left.
constexpr int kSoonMs = 2;
/// What a peer wrote before it left is there, and whoever waited finds it in a moment; who waits
/// for it at so many looks in a row waits in vain.
constexpr int kLooksInVain = 3;

}  // namespace

Watcher::Watcher(int rank, Links& links, std::vector<Peer> peers)
    : rank_(rank),
      links_(links),
      peers_(std::move(peers)),
      states_(std::make_unique<std::atomic<State>[]>(peers_.size())),
      reasons_(peers_.size()),
      wake_(
          std::make_shared<Fd>(check_system(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd"))) {
  const bool neighbours =
      std::any_of(peers_.begin(), peers_.end(), [](const Peer& peer) { return peer.segment != 0; });
  if (neighbours) notify_of_retirements(wake_);
  if (peers_.size() > 1) thread_ = std::thread([this] { run(); });
}

Watcher::~Watcher() {
  ending_ = true;
  ::eventfd_write(wake_->get(), 1);
  if (thread_.joinable()) thread_.join();
}

void Watcher::report(int peer, State state_now, const std::string& why) {
  note(static_cast<std::size_t>(peer), state_now, why);
  ::eventfd_write(wake_->get(), 1);
}

void Watcher::note(std::size_t peer, State state_now, const std::string& why) {
  std::lock_guard lock(mutex_);
  if (state(peer) != State::connected) return;
  reasons_[peer] = why;
  states_[peer].store(state_now, std::memory_order_release);
  ++gone_;
}

void Watcher::add(Client& client) {
  {
    std::lock_guard lock(mutex_);
    clients_.push_back({&client, std::vector<int>(peers_.size()), false});
  }
  ::eventfd_write(wake_->get(), 1);  // a peer may be gone already
}

void Watcher::remove(Client& client) {
  std::lock_guard lock(mutex_);
  std::erase_if(clients_, [&](const Watched& watched) { return watched.client == &client; });
}

void Watcher::run() {
  while (!ending_) {
    const bool some_left = look();
    bool again_soon = false;
    if (gone_ > 0) {
      tell_clients();
      std::lock_guard lock(mutex_);
      again_soon = some_left && std::any_of(clients_.begin(), clients_.end(),
                                            [](const Watched& watched) { return !watched.told; });
    }
    sleep(again_soon);
  }
}

/// Until a link closes, somebody wakes the watcher, or it is time to look again.
void Watcher::sleep(bool again_soon) {
  std::vector<pollfd> waited{{wake_->get(), POLLIN, 0}};
  for (std::size_t peer = 0; peer < peers_.size(); ++peer)
    if (const int socket = links_.socket(static_cast<int>(peer));
        socket >= 0 && state(peer) == State::connected)
      waited.push_back({socket, POLLIN | POLLRDHUP, 0});
  ::poll(waited.data(), waited.size(), again_soon ? kSoonMs : -1);
  eventfd_t count = 0;
  ::eventfd_read(wake_->get(), &count);
}

/// Notes which peers have gone since the last look; whether some have left in good order.
bool Watcher::look() {
  bool some_left = false;
  for (std::size_t peer = 0; peer < peers_.size(); ++peer) {
    if (state(peer) == State::connected) {
      const State now = look_at(peer);
      if (now != State::connected) note(peer, now, {});
    }
    some_left = some_left || state(peer) == State::left;
  }
  return some_left;
}

Watcher::State Watcher::look_at(std::size_t peer) {
  if (static_cast<int>(peer) == rank_) return State::connected;
  if (peers_[peer].segment == 0) return links_.state(static_cast<int>(peer));
  return segment_retired(peers_[peer].segment) ? State::left : State::connected;
}

void Watcher::tell_clients() {
  std::lock_guard lock(mutex_);
  const std::optional<Error> dead = find_dead();
  for (Watched& watched : clients_) {
    std::optional<Error> lost = dead;
    for (std::size_t peer = 0; peer < peers_.size() && !watched.told && !lost; ++peer) {
      if (state(peer) != State::left) continue;
      int& looks = watched.looks_in_vain[peer];
      looks = watched.client->awaits(static_cast<int>(peer)) ? looks + 1 : 0;
      if (looks >= kLooksInVain) lost = left(static_cast<int>(peer));
    }
    if (!lost || watched.told) continue;
    watched.told = true;
    watched.client->lose(*lost);
  }
}

std::optional<Error> Watcher::find_dead() const {
  for (std::size_t peer = 0; peer < peers_.size(); ++peer)
    if (state(peer) == State::died)
      return Error(ErrorCode::peer_lost,
                   reasons_[peer].empty()
                       ? fmt::format("the process of rank {} (pid {}) died", peer, peers_[peer].pid)
                       : reasons_[peer],
                   {rank_, static_cast<int>(peer), Phase::none});
  return std::nullopt;
}

Error Watcher::left(int peer) const {
  return {ErrorCode::peer_lost,
          fmt::format("rank {} left the job while rank {} still waited for it", peer, rank_),
          {rank_, peer, Phase::none}};
}

std::optional<Error> Watcher::find_lost(int awaited) const {
  if (gone_.load(std::memory_order_acquire) == 0) return std::nullopt;
  if (auto dead = find_dead()) return dead;
  if (awaited < 0 || state(static_cast<std::size_t>(awaited)) != State::left) return std::nullopt;
  // It may have left because another rank died; the system closes a dead rank's sockets one by one,
  // so this rank may hear of that death a little later.
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  if (auto dead = find_dead()) return dead;
  return left(awaited);
}

}  // namespace expertwire
