#pragma once

#include "comm/transport/transport.hpp"

namespace expertwire::inline v0 {

/// Maps the memfd that the peer passed.
Memory import_shm(const ImportRequest& request);

}  // namespace expertwire
