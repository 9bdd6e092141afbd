#include "comm/transport/transport.hpp"
#include "comm/transport/loopback/memory.hpp"
#include "comm/transport/mapped_connection.hpp"

namespace expertwire::inline v0 {

namespace {

/// Reaches ranks of the same process: this rank itself, and ranks that are threads.
class LoopbackTransport final : public Transport {
 public:
  std::string_view name() const noexcept override { return "loopback"; }
  MemoryKind kind() const noexcept override { return MemoryKind::host; }
  Reach reach(const Endpoint& self, const Endpoint& peer) const override {
    const bool same = self.process == peer.process;
    return {same, same ? "same process" : "another process"};
  }
  Memory import(const ImportRequest& request) const override { return import_loopback(request); }
  Memory open(const OpenRequest& request) const override { return open_loopback(request); }
  std::unique_ptr<Connection> connect(const Endpoint&, int peer) const override {
    return std::make_unique<MappedConnection>(peer, name());
  }
};

}  // namespace

std::unique_ptr<Transport> make_loopback_transport() {
  return std::make_unique<LoopbackTransport>();
}

}  // namespace expertwire
