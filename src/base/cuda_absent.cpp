// The base layer's share of CUDA in builds without it.
#include "base/check.hpp"
#include "base/cuda_calls.hpp"

namespace expertwire::inline v0 {

namespace {

[[noreturn]] void refuse() {
  throw Error(ErrorCode::unsupported, "this build of expertwire has no CUDA");
}

}  // namespace

void synchronize_cuda_stream(void*) { refuse(); }

int device_of_memory(const void*, int) { refuse(); }

}  // namespace expertwire
