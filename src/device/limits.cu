#include "device/limits.hpp"

namespace expertwire {

namespace {

constexpr int kThreads = 1024;

__global__ void __launch_bounds__(kThreads) store_all(const __grid_constant__ StoreAllParams p) {
  const std::size_t vectors = p.bytes_per_peer / sizeof(uint4);
  const std::size_t stride = static_cast<std::size_t>(gridDim.x) * kThreads;
  const auto* source = static_cast<const uint4*>(p.source);
  for (std::size_t v = blockIdx.x * static_cast<std::size_t>(kThreads) + threadIdx.x; v < vectors;
       v += stride) {
    const uint4 value = source[v];
    for (int i = 0; i < p.count; ++i) static_cast<uint4*>(p.peers[i])[v] = value;
  }
}

}  // namespace

cudaError_t launch_store_all(const StoreAllParams& params, int blocks, cudaStream_t stream) {
  store_all<<<blocks, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace expertwire
