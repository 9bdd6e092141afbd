#include "device/spin.hpp"

#include "device/ptx.cuh"

namespace expertwire::inline v0 {

namespace {

__global__ void spin(std::uint64_t nanoseconds) {
  const std::uint64_t start = device::now_ns();
  while (device::now_ns() - start < nanoseconds) {
  }
}

}  // namespace

cudaError_t launch_spin(std::uint64_t nanoseconds, cudaStream_t stream) {
  spin<<<1, 1, 0, stream>>>(nanoseconds);
  return cudaGetLastError();
}

}  // namespace expertwire
