#pragma once

// All of expertwire's public API.

#include "expertwire/allocator.hpp"        // IWYU pragma: export
#include "expertwire/bootstrap.hpp"        // IWYU pragma: export
#include "expertwire/communicator.hpp"     // IWYU pragma: export
#include "expertwire/connection.hpp"       // IWYU pragma: export
#include "expertwire/dispatch_layout.hpp"  // IWYU pragma: export
#include "expertwire/error.hpp"            // IWYU pragma: export
#include "expertwire/high_throughput.hpp"  // IWYU pragma: export
#include "expertwire/low_latency.hpp"      // IWYU pragma: export
#include "expertwire/memory_channel.hpp"   // IWYU pragma: export
#include "expertwire/port_channel.hpp"     // IWYU pragma: export
#include "expertwire/version.hpp"          // IWYU pragma: export
