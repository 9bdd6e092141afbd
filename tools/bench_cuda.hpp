#pragma once

#include "bench.hpp"

namespace expertwire::tools {

/// The benches on CUDA: host, stream and graph times, and the wire's own limit in the same run.
/// Throws in builds without CUDA.
Measurement bench_cuda_low_latency(const std::shared_ptr<Communicator>& communicator,
                                   const BenchOptions& options);
Measurement bench_cuda_high_throughput(const std::shared_ptr<Communicator>& communicator,
                                       const BenchOptions& options);

}  // namespace expertwire::tools
