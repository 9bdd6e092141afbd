#include <stdexcept>

#include "bench_cuda.hpp"

namespace expertwire::tools {

namespace {

[[noreturn]] void refuse() { throw std::logic_error("this build of expertwire has no CUDA"); }

}  // namespace

Measurement bench_cuda_low_latency(const std::shared_ptr<Communicator>&, const BenchOptions&) {
  refuse();
}
Measurement bench_cuda_high_throughput(const std::shared_ptr<Communicator>&, const BenchOptions&) {
  refuse();
}

std::vector<SweepPoint> sweep(const std::shared_ptr<Communicator>&, const BenchOptions&) {
  refuse();
}

}  // namespace expertwire::tools
