#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "reference/space.hpp"

namespace expertwire::reference {

namespace {

void check(cudaError_t result) {
  if (result != cudaSuccess)
    throw std::runtime_error(std::string("CUDA in the reference: ") + cudaGetErrorString(result));
}

/// Device memory. Everything goes through one stream and never waits for the whole device, where
/// kernels of other ranks may be waiting for this one.
class CudaSpace final : public Space {
 public:
  explicit CudaSpace(int device) : device_(device) {
    check(cudaSetDevice(device));
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  ~CudaSpace() override {
    cudaSetDevice(device_);
    for (void* block : blocks_) cudaFreeAsync(block, stream_);
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
  }
  void* make_poisoned(std::size_t bytes) override {
    check(cudaSetDevice(device_));
    void* data = nullptr;
    check(cudaMallocAsync(&data, bytes, stream_));
    blocks_.push_back(data);
    // Not by a kernel: loading its module may wait for the whole device.
    const std::vector<unsigned char> poison(bytes, 0x7B);
    copy(data, poison.data(), bytes);
    return data;
  }
  void copy(void* to, const void* from, std::size_t bytes) override {
    check(cudaSetDevice(device_));
    if (bytes > 0) check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_));
    check(cudaStreamSynchronize(stream_));
  }

 private:
  int device_;
  cudaStream_t stream_ = nullptr;
  std::vector<void*> blocks_;
};

}  // namespace

std::unique_ptr<Space> make_cuda_space(int device) { return std::make_unique<CudaSpace>(device); }

}  // namespace expertwire::reference
