#include "base/cuda.hpp"

#include <cstring>
#include <map>
#include <mutex>

#include "base/check.hpp"
#include "base/cuda_calls.hpp"
#include "expertwire/tensor.hpp"

namespace expertwire::inline v0 {

void check_cuda(cudaError_t result, const char* call) {
  if (result == cudaSuccess) [[likely]]
    return;
  // The runtime remembers it, and the next launch would be blamed.
  cudaGetLastError();
  throw Error(ErrorCode::system, fmt::format("{} failed: {} ({})", call, cudaGetErrorString(result),
                                             cudaGetErrorName(result)));
}

DeviceGuard::DeviceGuard(int device) {
  check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
  if (before_ == device)
    before_ = -1;
  else
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
  cudaThreadExchangeStreamCaptureMode(&mode_);
}

DeviceGuard::DeviceGuard(int device, std::nothrow_t) noexcept {
  if (cudaGetDevice(&before_) != cudaSuccess || before_ == device)
    before_ = -1;
  else
    cudaSetDevice(device);
  cudaThreadExchangeStreamCaptureMode(&mode_);
}

DeviceGuard::~DeviceGuard() {
  cudaThreadExchangeStreamCaptureMode(&mode_);
  if (before_ >= 0) cudaSetDevice(before_);
}

std::shared_ptr<CUstream_st> make_cuda_stream(int device) {
  const DeviceGuard guard(device);
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  return {stream, [device](cudaStream_t s) {
            const DeviceGuard on(device, std::nothrow);
            cudaStreamDestroy(s);
          }};
}

std::shared_ptr<void> allocate_on_device(std::size_t bytes, int device,
                                         std::shared_ptr<CUstream_st> stream) {
  const DeviceGuard guard(device);
  void* data = nullptr;
  check_cuda(cudaMallocAsync(&data, bytes, stream.get()), "cudaMallocAsync");
  // The memory can be used from any stream once the allocation has been reached.
  check_cuda(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
  return {data, [device, stream](void* p) {
            const DeviceGuard on(device, std::nothrow);
            cudaFreeAsync(p, stream.get());
          }};
}

namespace {

/// Pinned blocks that nobody uses now. They are kept, because freeing one may wait for the whole
/// device, where a kernel may be waiting for the rank that frees.
struct PinnedCache {
  std::mutex mutex;
  std::multimap<std::size_t, void*> free;
};

PinnedCache& pinned_cache() {
  static auto* cache = new PinnedCache;  // outlives every owner of a block
  return *cache;
}

}  // namespace

std::shared_ptr<void> allocate_pinned(std::size_t bytes) {
  PinnedCache& cache = pinned_cache();
  void* data = nullptr;
  {
    std::lock_guard lock(cache.mutex);
    auto it = cache.free.find(bytes);
    if (it != cache.free.end()) {
      data = it->second;
      cache.free.erase(it);
    }
  }
  if (data == nullptr)
    check_cuda(cudaHostAlloc(&data, bytes, cudaHostAllocPortable | cudaHostAllocMapped),
               "cudaHostAlloc");
  std::memset(data, 0, bytes);
  return {data, [bytes](void* p) {
            std::lock_guard lock(pinned_cache().mutex);
            pinned_cache().free.emplace(bytes, p);
          }};
}

void synchronize_cuda_stream(void* stream) {
  check_cuda(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), "cudaStreamSynchronize");
}

int device_of_memory(const void* data, int device) {
  cudaPointerAttributes found{};
  check_cuda(cudaPointerGetAttributes(&found, data), "cudaPointerGetAttributes");
  switch (found.type) {
    case cudaMemoryTypeDevice:
      return found.device;
    case cudaMemoryTypeManaged:
      return device;
    default:
      return kHost;
  }
}

}  // namespace expertwire
