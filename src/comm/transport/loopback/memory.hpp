#pragma once

#include "comm/transport/transport.hpp"

namespace expertwire::inline v0 {

/// The very mapping of a rank of this process, kept alive by the result.
Memory import_loopback(const ImportRequest& request);
/// All memory of this process is at hand.
Memory open_loopback(const OpenRequest& request);

}  // namespace expertwire
