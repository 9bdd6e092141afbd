#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace expertwire {

/// What every rank tells all others when a communicator is made. Exchanged as bytes.
struct Endpoint {
  std::array<char, 32> version;
  std::array<char, 96> host;
  std::array<char, 48> link_address;  ///< local socket for descriptors and liveness
  std::uint64_t process;
  std::uint64_t segment;  ///< id of the arena's memory within its process
  std::uint64_t arena_bytes;
  std::int32_t rank;
  std::int32_t pid;
  std::int32_t cores;
  std::int32_t numa_node;
  std::int32_t ranks_per_node;
};

}  // namespace expertwire
