#pragma once

#include "comm/transport/transport.hpp"

namespace expertwire::inline v0 {

/// Maps a peer's device memory, by the way in which the peer shares it, and lets this rank's device
/// read and write it.
Memory import_cuda_ipc(const ImportRequest& request);
/// Memory that a user of the peer has registered: of this process, of the arena, or by cudaIpc.
Memory open_cuda_ipc(const OpenRequest& request);

}  // namespace expertwire
