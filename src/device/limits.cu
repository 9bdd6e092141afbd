#include "device/limits.hpp"

#include "device/ptx.cuh"

namespace expertwire::inline v0 {

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

constexpr std::size_t kPiece = 14336;
constexpr int kBulkWarps = 8;

/// Each warp keeps two pieces for each peer on their way.
__global__ void __launch_bounds__(kBulkWarps * 32)
    bulk_store_all(const __grid_constant__ StoreAllParams p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) std::byte piece[];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::size_t stride = static_cast<std::size_t>(gridDim.x) * kBulkWarps * kPiece;
  std::size_t at = (blockIdx.x * kBulkWarps + threadIdx.x / 32) * kPiece;
  for (; at < p.bytes_per_peer; at += stride) {
    const std::size_t left = p.bytes_per_peer - at, bytes = left < kPiece ? left : kPiece;
    for (int i = lane; i < p.count; i += 32)
      device::bulk_store(static_cast<std::byte*>(p.peers[i]) + at, piece,
                         static_cast<std::uint32_t>(bytes));
    device::bulk_commit();
    device::bulk_wait<1>();
  }
  device::bulk_wait<0>();
#endif
}

}  // namespace

cudaError_t launch_bulk_store_all(const StoreAllParams& params, int blocks, cudaStream_t stream) {
  bulk_store_all<<<blocks, kBulkWarps * 32, kPiece, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t launch_store_all(const StoreAllParams& params, int blocks, cudaStream_t stream) {
  store_all<<<blocks, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace expertwire
