#pragma once

#include <cstddef>

#include "expertwire/communicator.hpp"

namespace expertwire::tools {

/// Median microseconds in which this rank copies `bytes` with memcpy on `threads` threads while all
/// other ranks do the same, through buffers that do not stay in caches. Collective.
double measure_memcpy(Communicator& communicator, std::size_t bytes, int threads);

/// What the host has left for this and other programs, as far as the system says; control groups
/// included.
double free_memory_bytes();

}  // namespace expertwire::tools
