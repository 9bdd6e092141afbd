#include "comm/bootstrap/rendezvous.hpp"

#include <cstring>
#include <thread>

#include "base/check.hpp"
#include "comm/handshake.hpp"
#include "comm/socket.hpp"

namespace expertwire::inline v0 {

namespace {

/// A star: every rank holds one authenticated socket to rank 0, which gathers and hands out.
class Rendezvous final : public Bootstrap {
 public:
  Rendezvous(const RendezvousRequest& request, const std::function<std::string()>& secret)
      : request_(request) {
    const Deadline deadline = Deadline::after(request.timeout);
    if (request.rank == 0)
      gather_guests(party(secret()), deadline);
    else
      visit_host(secret, deadline);
    barrier(deadline);
  }

  int rank() const noexcept override { return request_.rank; }
  int size() const noexcept override { return request_.size; }
  std::string_view kind() const noexcept override { return "rendezvous"; }

  void all_gather(void* data, std::size_t bytes_per_rank, Deadline deadline) override {
    ++calls_;
    auto* bytes = static_cast<char*>(data);
    if (rank() == 0)
      gather_and_hand_out(bytes, bytes_per_rank, deadline);
    else
      hand_in(bytes, bytes_per_rank, deadline);
  }

 private:
  enum class Trouble : std::int32_t { gone, late, differs };
  /// Goes before the data in both directions.
  struct Frame {
    std::uint64_t call;
    std::uint64_t bytes_per_rank;
    std::int32_t lost;  ///< from rank 0: -1, or the rank for which the call failed
    Trouble trouble;    ///< from rank 0: and why
  };

  Party party(const std::string& secret) const { return {secret, "rendezvous", rank(), size()}; }

  void visit_host(const std::function<std::string()>& secret, Deadline deadline) {
    Fd socket;
    while (!(socket = connect_authenticated(request_.address, party(secret()), 0, deadline))) {
      check(!deadline.expired(), ErrorCode::refused,
            "rank {} and whoever listens at {} could not agree on the job's secret within {} ms; "
            "do all ranks have the same secret, number of ranks ({}) and version?",
            rank(), request_.address, deadline.budget().count(), size());
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    sockets_.push_back(std::move(socket));
  }

  void gather_guests(const Party& self, Deadline deadline) {
    // The listener closes with the acceptor, before the barrier that ends the constructor: a rank
    // that goes on to another rendezvous of the same name cannot reach this one.
    Acceptor acceptor(size() > 1 ? listen_on(request_.address) : Fd(), self);
    sockets_.resize(static_cast<std::size_t>(size()));
    for (int missing = size() - 1; missing > 0;) {
      Acceptor::Guest guest = acceptor.next(deadline);
      if (guest.rank < 0) throw Error(ErrorCode::timeout, absent_ranks(), context(-1));
      Fd& place = sockets_[static_cast<std::size_t>(guest.rank)];
      if (!place) --missing;  // else it came again, and its earlier connection is of no use
      place = std::move(guest.socket);
    }
  }

  std::string absent_ranks() const {
    std::string text;
    for (int r = 1; r < size(); ++r)
      if (!sockets_[static_cast<std::size_t>(r)])
        text += fmt::format("{}{}", text.empty() ? "" : ", ", r);
    return fmt::format("these of {} ranks did not join at {} within {} ms: {}", size(),
                       request_.address, request_.timeout.count(), text);
  }

  static Trouble trouble_of(Transfer result) {
    return result == Transfer::timed_out ? Trouble::late : Trouble::gone;
  }
  ErrorContext context(int peer) const { return {rank(), peer, Phase::bootstrap}; }

  [[noreturn]] void fail(int peer, Trouble trouble, Deadline deadline) const {
    if (trouble == Trouble::late)
      throw Error(ErrorCode::timeout,
                  fmt::format("rank {} did not come within {} ms", peer, deadline.budget().count()),
                  context(peer));
    if (trouble == Trouble::differs)
      throw Error(ErrorCode::mismatch,
                  fmt::format("all_gather, call {}: rank {} came with another size, or for another "
                              "call, than rank 0; do all ranks make the same calls?",
                              calls_, peer),
                  context(peer));
    throw Error(ErrorCode::peer_lost, fmt::format("rank {} has left the job", peer), context(peer));
  }

  void gather_and_hand_out(char* data, std::size_t bytes, Deadline deadline) {
    int lost = -1;
    Trouble trouble = Trouble::gone;
    for (int r = 1; r < size() && lost < 0; ++r) {
      Frame frame{};
      const int fd = sockets_[static_cast<std::size_t>(r)].get();
      Transfer result = receive_all(fd, &frame, sizeof(frame), deadline);
      const bool same = frame.call == calls_ && frame.bytes_per_rank == bytes;
      if (result == Transfer::done && same)
        result = receive_all(fd, data + static_cast<std::size_t>(r) * bytes, bytes, deadline);
      if (result == Transfer::done && same) continue;
      lost = r;
      trouble = result == Transfer::done ? Trouble::differs : trouble_of(result);
    }
    // All others are told, also when one cannot be: what they need is complete, or lost for all.
    const bool complete = lost < 0;
    const Frame frame{calls_, bytes, lost, trouble};
    const Deadline farewell = complete ? deadline : Deadline::after(std::chrono::seconds(1));
    for (int r = 1; r < size(); ++r) {
      if (!complete && r == lost && trouble != Trouble::differs) continue;
      const int fd = sockets_[static_cast<std::size_t>(r)].get();
      Transfer result = send_all(fd, &frame, sizeof(frame), farewell);
      if (result == Transfer::done && complete)
        result = send_all(fd, data, static_cast<std::size_t>(size()) * bytes, farewell);
      if (result != Transfer::done && lost < 0) lost = r, trouble = trouble_of(result);
    }
    if (lost >= 0) fail(lost, trouble, deadline);
  }

  void hand_in(char* data, std::size_t bytes, Deadline deadline) {
    const int fd = sockets_.front().get();
    const Frame frame{calls_, bytes, -1, Trouble::gone};
    Frame answer{};
    // Rank 0 knows who is late, so it gets a little longer to say so.
    const Deadline patience = Deadline::after(deadline.remaining() + std::chrono::seconds(2));
    // If rank 0 has given up already, sending fails; why it did is still there to be read.
    if (send_all(fd, &frame, sizeof(frame), deadline) == Transfer::done)
      send_all(fd, data + static_cast<std::size_t>(rank()) * bytes, bytes, deadline);
    Transfer result = receive_all(fd, &answer, sizeof(answer), patience);
    if (result == Transfer::done && answer.lost >= 0) fail(answer.lost, answer.trouble, deadline);
    if (result == Transfer::done)
      result = receive_all(fd, data, static_cast<std::size_t>(size()) * bytes, patience);
    if (result != Transfer::done) fail(0, trouble_of(result), deadline);
  }

  RendezvousRequest request_;
  std::vector<Fd> sockets_;  // rank 0: one a rank; others: the one to rank 0
  std::uint64_t calls_ = 0;
};

}  // namespace

std::shared_ptr<Bootstrap> join_rendezvous(const RendezvousRequest& request,
                                           const std::function<std::string()>& secret) {
  return std::make_shared<Rendezvous>(request, secret);
}

std::shared_ptr<Bootstrap> bootstrap_from_rendezvous(const RendezvousRequest& request) {
  check_argument(request.size >= 1 && request.rank >= 0 && request.rank < request.size,
                 "bootstrap_from_rendezvous: rank {} of size {}; it must be 0 <= rank < size",
                 request.rank, request.size);
  check_argument(request.secret.size() >= 16,
                 "bootstrap_from_rendezvous: secret has {} bytes; it must have at least 16",
                 request.secret.size());
  return join_rendezvous(request, [&] { return request.secret; });
}

}  // namespace expertwire
