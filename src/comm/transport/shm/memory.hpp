#pragma once

#include "comm/transport/transport.hpp"

namespace expertwire::inline v0 {

/// Maps the memfd that the peer passed.
Memory import_shm(const ImportRequest& request);
/// A part of that; other memory of another process cannot be mapped.
Memory open_shm(const OpenRequest& request);

}  // namespace expertwire
