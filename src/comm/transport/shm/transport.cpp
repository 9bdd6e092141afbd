#include "comm/transport/transport.hpp"
#include "comm/transport/mapped_connection.hpp"
#include "comm/transport/shm/memory.hpp"

namespace expertwire::inline v0 {

namespace {

/// Reaches other processes of this host through memory that both map.
class ShmTransport final : public Transport {
 public:
  std::string_view name() const noexcept override { return "shm"; }
  MemoryKind kind() const noexcept override { return MemoryKind::host; }
  Reach reach(const Endpoint& self, const Endpoint& peer) const override {
    const bool same = self.host == peer.host;
    return {same, same ? "same host, memfd mapped" : "another host"};
  }
  Memory import(const ImportRequest& request) const override { return import_shm(request); }
  Memory open(const OpenRequest& request) const override { return open_shm(request); }
  std::unique_ptr<Connection> connect(const Endpoint&, int peer) const override {
    return std::make_unique<MappedConnection>(peer, name());
  }
};

}  // namespace

std::unique_ptr<Transport> make_shm_transport() { return std::make_unique<ShmTransport>(); }

}  // namespace expertwire
