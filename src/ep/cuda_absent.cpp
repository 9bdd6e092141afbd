// The ep layer's share of CUDA in builds without it. A communicator on a CUDA device cannot be made
// there, so nobody comes here.
#include "base/check.hpp"
#include "ep/front/high_throughput_engine.hpp"
#include "ep/front/low_latency_engine.hpp"

namespace expertwire::inline v0::ep {

std::unique_ptr<LowLatencyEngine> make_cuda_engine(Object&, const LowLatencyOptions&) {
  throw Error(ErrorCode::unsupported, "this build of expertwire has no CUDA");
}

std::unique_ptr<HighThroughputEngine> make_cuda_engine(Object&, const HighThroughputOptions&) {
  throw Error(ErrorCode::unsupported, "this build of expertwire has no CUDA");
}

}  // namespace expertwire::ep
