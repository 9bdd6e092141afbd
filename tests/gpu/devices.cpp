#include <cuda_runtime_api.h>

#include "ranks/thread_ranks.hpp"

namespace expertwire::test {

int cuda_device_of(int rank) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) return -1;
  return rank % count;
}

namespace {

/// Without a device all tests of these programs are skipped, wholly: none goes on to expectations
/// about what did not run.
class NeedsDevice : public testing::Environment {
 public:
  void SetUp() override {
    if (cuda_device_of(0) < 0)
      GTEST_SKIP() << "no CUDA device here; tools/gpu_check.sh runs this where there is one";
  }
};

const auto* const kNeedsDevice = testing::AddGlobalTestEnvironment(new NeedsDevice);

}  // namespace

}  // namespace expertwire::test
