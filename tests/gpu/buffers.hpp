#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "base/cuda.hpp"
#include "expertwire/tensor.hpp"
#include "reference/workload.hpp"

namespace expertwire::test {

/// Device tensors and a stream for one rank of a test; nothing here waits for the whole device.
class Buffers {
 public:
  explicit Buffers(int device)
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
  void copy(void* to, const void* from, std::size_t bytes) const {
    if (bytes > 0)
      check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream()), "cudaMemcpyAsync");
  }
  void poison(const TensorView& view) const {
    check_cuda(cudaMemsetAsync(view.data(), 0x7B, view.bytes(), stream()), "cudaMemsetAsync");
  }
  std::vector<std::byte> download(const ConstTensorView& view) const {
    // First wait without a copy: one into pageable memory holds the driver while it waits, and the
    // other ranks of this process could not launch what it waits for.
    synchronize();
    std::vector<std::byte> host(view.bytes());
    copy(host.data(), view.data(), view.bytes());
    synchronize();
    return host;
  }
  void synchronize() const { check_cuda(cudaStreamSynchronize(stream()), "cudaStreamSynchronize"); }

 private:
  int device_;
  std::shared_ptr<CUstream_st> stream_, memory_stream_;
  std::vector<std::shared_ptr<void>> memory_;
};

/// The inputs of one step, on the device.
struct StepInputs {
  TensorView x, topk_idx, topk_weights;

  StepInputs(Buffers& buffers, const MoeShape& shape, int tokens)
      : x(buffers.make(shape.dtype, {tokens, shape.hidden})),
        topk_idx(buffers.make(DType::int64, {tokens, shape.top_k})),
        topk_weights(buffers.make(DType::fp32, {tokens, shape.top_k})) {}
  /// Takes the first tokens of `input`.
  void fill(const Buffers& buffers, const reference::RankInput& input) const {
    buffers.copy(x.data(), input.x.data(), x.bytes());
    buffers.copy(topk_idx.data(), input.topk_idx.data(), topk_idx.bytes());
    buffers.copy(topk_weights.data(), input.topk_weights.data(), topk_weights.bytes());
  }
};

}  // namespace expertwire::test
