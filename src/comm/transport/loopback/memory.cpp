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

Memory open_loopback(const OpenRequest& request) {
  const MemoryOffer& offer = request.offer;
  if (offer.in_arena()) return part_of_arena(offer, request.arena);
  return {offer.rank, not_owned(offer.address), offer.bytes, offer.kind};
}

}  // namespace expertwire
