#pragma once

#include "comm/transport/transport.hpp"

namespace expertwire {

/// Maps the memfd that the peer passed.
Memory import_shm(const ImportRequest& request);

}  // namespace expertwire
