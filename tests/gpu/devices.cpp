#include <cuda_runtime_api.h>

#include "ranks/thread_ranks.hpp"

namespace expertwire::test {

int cuda_device_of(int rank) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) return -1;
  return rank % count;
}

}  // namespace expertwire::test
