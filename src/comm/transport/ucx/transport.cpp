#include "comm/transport/transport.hpp"

#include "base/check.hpp"
#include "comm/proxy/proxies.hpp"
#include "comm/transport/ucx/engine.hpp"
#include "comm/transport/ucx/memory.hpp"

namespace expertwire::inline v0 {

namespace {

/// Reaches ranks of other hosts, over whatever network UCX has a way through.
class UcxTransport final : public Transport {
 public:
  std::string_view name() const noexcept override { return "ucx"; }
  MemoryKind kind() const noexcept override { return MemoryKind::host; }
  Reach reach(const Endpoint& self, const Endpoint& peer) const override {
    const std::string_view mine = self.ucx_version.data(), theirs = peer.ucx_version.data();
    if (mine.empty()) return {false, fmt::format("no UCX here: {}", ucx_presence().why_not)};
    if (theirs.empty())
      return {false,
              fmt::format("rank {} has no UCX; `expertwire doctor` there says why", peer.rank)};
    if (mine == theirs) return {true, fmt::format("UCX {}", mine)};
    return {true, fmt::format("UCX {}, and {} there", mine, theirs)};
  }
  Memory import(const ImportRequest& request) const override { return import_ucx(request); }
  Memory open(const OpenRequest& request) const override { return open_ucx(request); }
  std::unique_ptr<Connection> connect(const Endpoint&, int) const override {
    throw Error(ErrorCode::invalid_usage, "a connection over ucx is a proxy's; see Proxies");
  }
};

}  // namespace

std::unique_ptr<Transport> make_ucx_transport() { return std::make_unique<UcxTransport>(); }

}  // namespace expertwire
