#include "comm/transport/ucx/memory.hpp"

namespace expertwire::inline v0 {

Memory import_ucx(const ImportRequest& request) {
  return {request.peer.rank, nullptr, request.peer.arena_bytes};
}

Memory open_ucx(const OpenRequest& request) {
  return {request.offer.rank, nullptr, request.offer.bytes, request.offer.kind};
}

}  // namespace expertwire
