#pragma once

#include "comm/transport/transport.hpp"

namespace expertwire::inline v0 {

/// The peer's arena: nothing of it is mapped here; its proxy writes to it.
Memory import_ucx(const ImportRequest& request);
/// Memory that the peer has registered: known by its number alone.
Memory open_ucx(const OpenRequest& request);

}  // namespace expertwire
