#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace expertwire::inline v0 {

/// Holds `stream` up for that long, by a thread that looks at the device's clock: a rank that is
/// late, for measurements and tests.
cudaError_t launch_spin(std::uint64_t nanoseconds, cudaStream_t stream);

}  // namespace expertwire
