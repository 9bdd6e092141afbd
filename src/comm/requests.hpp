#pragma once

#include "base/check.hpp"
#include "expertwire/connection.hpp"

namespace expertwire::inline v0 {

// Checks of what callers ask to be written at a peer; all throw `Error{invalid_argument}`.

inline void check_range(std::string_view what, const Memory& memory, std::uint64_t offset,
                        std::uint64_t bytes) {
  check_argument(offset <= memory.bytes() && bytes <= memory.bytes() - offset,
                 "{}: bytes {} to {} lie outside the memory of rank {}, which has {}", what, offset,
                 offset + bytes, memory.rank(), memory.bytes());
}

inline void check_destination(std::string_view what, const Memory& memory, int peer) {
  check_argument(memory.rank() == peer, "{}: the destination is memory of rank {}, not of rank {}",
                 what, memory.rank(), peer);
}

inline void check_word(std::string_view what, const Memory& memory, std::uint64_t offset,
                       int peer) {
  check_destination(what, memory, peer);
  // Network cards drop misaligned atomics in silence, so no transport takes them.
  check_argument(offset % sizeof(std::uint64_t) == 0,
                 "{}: destination_offset is {}; it must be a multiple of 8", what, offset);
  check_range(what, memory, offset, sizeof(std::uint64_t));
}

inline void check_put(std::string_view what, const PutRequest& request, int peer) {
  check_destination(what, request.destination, peer);
  check_argument(request.source.data() != nullptr,
                 "{}: the source must be memory that this process can read", what);
  check_range(fmt::format("{}: destination", what), request.destination, request.destination_offset,
              request.bytes);
  check_range(fmt::format("{}: source", what), request.source, request.source_offset,
              request.bytes);
}

/// For what a proxy carries: it knows memory by its number.
inline void check_registered(std::string_view what, const Memory& memory) {
  check_argument(memory.id() != Memory::kNoId,
                 "{}: memory of rank {} is not registered with this communicator; see "
                 "Communicator::register_memory and open_memory",
                 what, memory.rank());
}

}  // namespace expertwire
