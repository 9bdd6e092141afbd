#include "comm/transport/shm/memory.hpp"

#include "comm/segment.hpp"

namespace expertwire::inline v0 {

Memory import_shm(const ImportRequest& request) {
  return {request.peer.rank, map_segment(request.descriptor, request.peer.arena_bytes),
          request.peer.arena_bytes};
}

}  // namespace expertwire
