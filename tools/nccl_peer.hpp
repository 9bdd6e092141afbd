#pragma once

#include <cuda_runtime_api.h>

#include "bench.hpp"

namespace expertwire::tools {

/// The same bytes by NCCL, for comparison, between events on `stream`: an all-to-all of the rows
/// that go to each rank, which somebody would still have to pack and unpack, and all_gather with
/// reduce_scatter of all tokens. NCCL is loaded at run time; collective.
///
/// Throws std::runtime_error with what to do if libnccl.so.2 is not found.
std::vector<Peer> bench_nccl(Communicator& communicator, const Steps& steps,
                             const BenchOptions& options, cudaStream_t stream);

}  // namespace expertwire::tools
