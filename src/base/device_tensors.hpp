#pragma once

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <vector>

#include "base/cuda.hpp"
#include "expertwire/tensor.hpp"

namespace expertwire::inline v0 {

/// A stream, and device tensors that live as long as this does. Nothing here waits for the whole
/// device. For tools and tests.
class DeviceTensors {
 public:
  explicit DeviceTensors(int device)
      : device_(device),
        stream_(make_cuda_stream(device)),
        memory_stream_(make_cuda_stream(device)) {
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  cudaStream_t stream() const { return stream_.get(); }
  TensorView make(DType dtype, std::initializer_list<std::int64_t> shape) {
    const std::size_t bytes = TensorView(nullptr, dtype, shape).bytes();
    memory_.push_back(
        allocate_on_device(std::max<std::size_t>(bytes, 16), device_, memory_stream_));
    return {memory_.back().get(), dtype, shape};
  }
  /// Between memories of any kind; queued on the stream.
  void copy(void* to, const void* from, std::size_t bytes) const {
    if (bytes > 0)
      check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream()), "cudaMemcpyAsync");
  }
  /// A tensor with a copy of `data`; waits for it.
  TensorView upload(const void* data, DType dtype, std::initializer_list<std::int64_t> shape) {
    const TensorView view = make(dtype, shape);
    copy(view.data(), data, view.bytes());
    synchronize();
    return view;
  }
  void synchronize() const { check_cuda(cudaStreamSynchronize(stream()), "cudaStreamSynchronize"); }

 private:
  int device_;
  std::shared_ptr<CUstream_st> stream_, memory_stream_;
  std::vector<std::shared_ptr<void>> memory_;
};

}  // namespace expertwire
