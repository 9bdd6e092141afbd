#pragma once

#include "comm/transport/transport.hpp"

namespace expertwire::inline v0 {

/// Maps a peer's device memory, by the way in which the peer shares it, and lets this rank's device
/// read and write it.
Memory import_cuda_ipc(const ImportRequest& request);

}  // namespace expertwire
