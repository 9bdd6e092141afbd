#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <vector>

#include "base/device_tensors.hpp"
#include "reference/workload.hpp"

namespace expertwire::test {

/// Device tensors of one rank of a test.
class Buffers : public DeviceTensors {
 public:
  using DeviceTensors::DeviceTensors;

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
