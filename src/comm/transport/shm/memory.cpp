#include "comm/transport/shm/memory.hpp"

#include "base/check.hpp"
#include "comm/segment.hpp"

namespace expertwire::inline v0 {

Memory import_shm(const ImportRequest& request) {
  return {request.peer.rank, map_segment(request.descriptor, request.peer.arena_bytes),
          request.peer.arena_bytes};
}

Memory open_shm(const OpenRequest& request) {
  check(request.offer.in_arena(), ErrorCode::unsupported,
        "memory {} of rank {} belongs to another process and was not made to be shared, so it "
        "cannot be mapped here; let rank {} take it from Communicator::allocate_memory",
        request.offer.id, request.peer.rank, request.peer.rank);
  return part_of_arena(request.offer, request.arena);
}

}  // namespace expertwire
