// The base layer's share of CUDA in builds without it.
#include "base/check.hpp"
#include "base/cuda_stream.hpp"

namespace expertwire {

void synchronize_cuda_stream(void*) {
  throw Error(ErrorCode::unsupported, "this build of expertwire has no CUDA");
}

}  // namespace expertwire
