#include "comm/transport/transport.hpp"

#include "base/check.hpp"
#include "comm/device_memory.hpp"
#include "comm/transport/staged/memory.hpp"

namespace expertwire::inline v0 {

namespace {

/// Operations pass through host memory; the device memory of the peer itself is out of reach.
class StagedConnection final : public Connection {
 public:
  StagedConnection(int rank, int peer) : rank_(rank), peer_(peer) {}

  int peer() const noexcept override { return peer_; }
  std::string_view transport() const noexcept override { return "staged"; }

 private:
  void do_put(const PutRequest&) override { refuse("put"); }
  void do_signal(const SignalRequest&) override { refuse("signal"); }
  void do_atomic_add(const AtomicAddRequest&) override { refuse("atomic_add"); }
  void do_flush(Deadline) override {}

  [[noreturn]] void refuse(std::string_view what) const {
    throw Error(ErrorCode::unsupported,
                fmt::format("{} to rank {}: its GPU and this rank's reach each other through host "
                            "memory alone, by which dispatch and combine go, and connections do "
                            "not",
                            what, peer_),
                {rank_, peer_, Phase::setup});
  }

  int rank_, peer_;
};

/// Reaches GPUs of this host, whether or not they can read and write each other.
class StagedTransport final : public Transport {
 public:
  std::string_view name() const noexcept override { return "staged"; }
  MemoryKind kind() const noexcept override { return MemoryKind::cuda; }
  Reach reach(const Endpoint& self, const Endpoint& peer) const override {
    if (self.host != peer.host) return {false, "another host"};
    if (self.cuda.uuid == peer.cuda.uuid && self.process != peer.process && !mps_runs())
      return {false, "another process on the same GPU"};
    return {true, "same host, host memory that both GPUs map"};
  }
  Memory import(const ImportRequest& request) const override { return import_staged(request); }
  Memory open(const OpenRequest& request) const override {
    throw Error(ErrorCode::unsupported,
                fmt::format("device memory {} of rank {} cannot be reached: its GPU and this "
                            "rank's exchange data through host memory alone; register host memory",
                            request.offer.id, request.peer.rank),
                {request.self.rank, request.peer.rank, Phase::setup});
  }
  std::unique_ptr<Connection> connect(const Endpoint& self, int peer) const override {
    return std::make_unique<StagedConnection>(self.rank, peer);
  }
};

}  // namespace

std::unique_ptr<Transport> make_staged_transport() { return std::make_unique<StagedTransport>(); }

}  // namespace expertwire
