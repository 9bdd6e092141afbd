#include "comm/handshake.hpp"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "base/check.hpp"
#include "base/log.hpp"

namespace expertwire::inline v0 {

namespace {

constexpr std::uint32_t kMagic = 0x65776831;
constexpr std::chrono::seconds kPatience{2};  // for one handshake

}  // namespace

Acceptor::Acceptor(Fd listener, Party self)
    : listener_(std::move(listener)), self_(std::move(self)) {}

Mac Acceptor::proof(const Party& party, const char* side, int rank, const Nonce& a,
                    const Nonce& b) {
  return authenticate(
      party.secret,
      fmt::format("expertwire {} {} rank {} of {} {} {}", party.purpose, side, rank, party.size,
                  to_hex(a.data(), a.size()), to_hex(b.data(), b.size())));
}

void Acceptor::drop_stranger(const char* why) {
  ++strangers_;
  log(LogLevel::warn, Subsystem::boot, "dropped a stranger at the {}: {} ({} so far)",
      self_.purpose, why, strangers_);
}

void Acceptor::admit() {
  Fd socket(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
  if (!socket) return;
  Pending pending{std::move(socket), {}, Deadline::after(kPatience)};
  fill_random(pending.nonce.data(), pending.nonce.size());
  if (send_all(pending.socket.get(), pending.nonce.data(), pending.nonce.size(),
               pending.deadline) == Transfer::done)
    pending_.push_back(std::move(pending));
  else
    drop_stranger("it left at once");
}

/// Reads what has come. Returns whether the connection is settled: a guest, or a stranger.
bool Acceptor::advance(Pending& pending, Guest& guest) {
  auto* buffer = reinterpret_cast<char*>(&pending.hello);
  const ssize_t count = ::recv(pending.socket.get(), buffer + pending.received,
                               sizeof(Hello) - pending.received, MSG_DONTWAIT);
  if (count < 0 && (errno == EAGAIN || errno == EINTR)) {
    if (!pending.deadline.expired()) return false;
    drop_stranger("no answer");
    return true;
  }
  if (count > 0) pending.received += static_cast<std::size_t>(count);
  if (count > 0 && pending.received < sizeof(Hello)) return false;

  const Hello& hello = pending.hello;
  const bool friendly =
      pending.received == sizeof(Hello) && hello.magic == kMagic && hello.size == self_.size &&
      hello.rank >= 0 && hello.rank < self_.size && hello.rank != self_.rank &&
      same(hello.proof, proof(self_, "guest", hello.rank, pending.nonce, hello.nonce));
  if (!friendly) {
    drop_stranger("no proof");
    return true;
  }
  const Mac answer = proof(self_, "host", self_.rank, hello.nonce, pending.nonce);
  if (send_all(pending.socket.get(), answer.data(), answer.size(), pending.deadline) ==
      Transfer::done) {
    guest.rank = hello.rank;
    guest.socket = std::move(pending.socket);
  }
  return true;
}

Acceptor::Guest Acceptor::next(Deadline deadline) {
  Guest guest;
  for (;;) {
    std::vector<pollfd> entries{{listener_.get(), POLLIN, 0}};
    for (const Pending& pending : pending_) entries.push_back({pending.socket.get(), POLLIN, 0});
    const auto slice = std::min(deadline.remaining(), std::chrono::milliseconds(100));
    const int ready = ::poll(entries.data(), entries.size(), static_cast<int>(slice.count()));
    if (ready < 0 && errno != EINTR) throw_system("poll", errno);
    for (auto it = pending_.begin(); it != pending_.end();) {
      const bool settled = advance(*it, guest);
      it = settled ? pending_.erase(it) : std::next(it);
      if (guest.rank >= 0) return guest;
    }
    if (ready > 0 && (entries[0].revents & POLLIN) != 0) admit();
    if (deadline.expired()) return guest;
  }
}

Fd connect_authenticated(const std::string& address, const Party& self, int peer,
                         Deadline deadline) {
  Fd socket = connect_to(address, deadline);
  Nonce challenge{};
  Mac answer{};
  Acceptor::Hello hello{kMagic, self.rank, self.size, {}, {}};
  fill_random(hello.nonce.data(), hello.nonce.size());
  if (receive_all(socket.get(), challenge.data(), challenge.size(), deadline) != Transfer::done)
    return Fd();
  hello.proof = Acceptor::proof(self, "guest", self.rank, challenge, hello.nonce);
  if (send_all(socket.get(), &hello, sizeof(hello), deadline) != Transfer::done ||
      receive_all(socket.get(), answer.data(), answer.size(), deadline) != Transfer::done ||
      !same(answer, Acceptor::proof(self, "host", peer, hello.nonce, challenge)))
    return Fd();
  return socket;
}

}  // namespace expertwire
