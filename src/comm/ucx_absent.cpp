// The comm layer's share of UCX in builds without its headers.
#include "base/check.hpp"
#include "comm/transport/transport.hpp"
#include "comm/transport/ucx/engine.hpp"

namespace expertwire::inline v0 {

std::unique_ptr<Transport> make_ucx_transport() { return nullptr; }

const UcxPresence& ucx_presence() {
  static const UcxPresence presence{
      false, "", "this build had no headers of UCX: libucx-dev was not found when it was built"};
  return presence;
}

std::vector<std::unique_ptr<Engine>> make_ucx_engines(int, int) {
  throw Error(ErrorCode::unsupported, ucx_presence().why_not);
}

}  // namespace expertwire
