#pragma once

#include <cuda_runtime_api.h>

#include "bench.hpp"

namespace expertwire::tools {

/// The same bytes by NCCL, for comparison, between events on `stream`: an all-to-all of the rows
/// that go to each rank, which somebody would still have to pack and unpack, and all_gather with
/// reduce_scatter of all tokens. Collective. NCCL is loaded at run time: both throw
/// std::runtime_error with what to do if libnccl.so.2 is not found.
void require_nccl();
std::vector<Peer> bench_nccl(Communicator& communicator, const Steps& steps,
                             const BenchOptions& options, cudaStream_t stream);

}  // namespace expertwire::tools
