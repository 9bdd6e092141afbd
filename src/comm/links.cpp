#include "comm/links.hpp"

#include <sys/socket.h>

#include <cerrno>

#include "base/check.hpp"

namespace expertwire::inline v0 {

namespace {

constexpr char kGoodbye = 'b';

}  // namespace

Links::Links(int rank) : rank_(rank) {
  Nonce name{};
  fill_random(name.data(), name.size());
  address_ = "@ew-" + to_hex(name.data(), name.size());
  listener_ = listen_on(address_);
}

void Links::connect(const std::vector<Peer>& peers, const std::string& secret, int size,
                    Deadline deadline) {
  const Party self{secret, "link", rank_, size};
  links_ = std::vector<Link>(static_cast<std::size_t>(size));
  int guests = 0;
  for (const Peer& peer : peers) {
    if (peer.rank > rank_) {
      ++guests;
      continue;
    }
    Fd socket;
    while (!(socket = connect_authenticated(peer.address, self, peer.rank, deadline)))
      if (deadline.expired())
        throw Error(ErrorCode::refused,
                    fmt::format("rank {} and this rank could not prove themselves to each other "
                                "within {} ms",
                                peer.rank, deadline.budget().count()),
                    {rank_, peer.rank, Phase::setup});
    links_[static_cast<std::size_t>(peer.rank)].socket = std::move(socket);
  }
  Acceptor acceptor(std::move(listener_), self);
  while (guests > 0) {
    Acceptor::Guest guest = acceptor.next(deadline);
    if (guest.rank < 0)
      throw Error(ErrorCode::timeout,
                  fmt::format("{} ranks of this host did not connect within {} ms", guests,
                              deadline.budget().count()),
                  {rank_, -1, Phase::setup});
    Fd& place = links_[static_cast<std::size_t>(guest.rank)].socket;
    if (!place) --guests;
    place = std::move(guest.socket);
  }
}

std::vector<Fd> Links::exchange(const Fd& mine, Deadline deadline) {
  std::vector<Fd> theirs(links_.size());
  auto require = [&](Transfer result, std::size_t peer) {
    if (result != Transfer::done)
      throw Error(result == Transfer::closed ? ErrorCode::peer_lost : ErrorCode::timeout,
                  fmt::format("exchanging memory with rank {} failed", peer),
                  {rank_, static_cast<int>(peer), Phase::setup});
  };
  for (std::size_t r = 0; r < links_.size(); ++r)
    if (links_[r].socket) require(send_fd(links_[r].socket.get(), mine.get(), deadline), r);
  for (std::size_t r = 0; r < links_.size(); ++r)
    if (links_[r].socket) require(receive_fd(links_[r].socket.get(), theirs[r], deadline), r);
  return theirs;
}

Links::State Links::state(int rank) {
  if (static_cast<std::size_t>(rank) >= links_.size()) return State::connected;
  Link& link = links_[static_cast<std::size_t>(rank)];
  if (!link.socket || link.state != State::connected) return link.state;
  char byte = 0;
  const ssize_t count = ::recv(link.socket.get(), &byte, 1, MSG_DONTWAIT | MSG_PEEK);
  if (count < 0 && (errno == EAGAIN || errno == EINTR)) return State::connected;
  const State now = count == 1 && byte == kGoodbye ? State::left : State::died;
  link.state = now;
  return now;
}

int Links::socket(int rank) const {
  const auto place = static_cast<std::size_t>(rank);
  return place < links_.size() && links_[place].socket ? links_[place].socket.get() : -1;
}

void Links::say_goodbye() noexcept {
  for (Link& link : links_)
    if (link.socket) ::send(link.socket.get(), &kGoodbye, 1, MSG_NOSIGNAL | MSG_DONTWAIT);
}

}  // namespace expertwire
