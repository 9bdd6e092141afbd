#include "comm/transport/loopback/memory.hpp"

#include "base/check.hpp"
#include "comm/segment.hpp"

namespace expertwire::inline v0 {

Memory import_loopback(const ImportRequest& request) {
  auto mapping = find_segment(request.peer.segment);
  check(mapping != nullptr, ErrorCode::peer_lost, "rank {} of this process has left",
        request.peer.rank);
  return {request.peer.rank, std::move(mapping), request.peer.arena_bytes};
}

}  // namespace expertwire
