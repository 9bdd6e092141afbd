// Operations of two lanes run side by side: shown by the device's own clock.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>

#include "base/device_tensors.hpp"
#include "ep/cuda/runtime/trace.hpp"
#include "ranks/thread_ranks.hpp"

namespace expertwire::test {
namespace {

using reference::RankInput;
using reference::RoutingPattern;
using reference::Workload;

const MoeShape kShape{4096, 16, 4, 2048, DType::bf16};

/// One micro-batch on a lane of its own.
class MicroBatch {
 public:
  MicroBatch(HighThroughput& object, DeviceTensors& device, const RankInput& input, int ranks)
      : object_(object), own_stream_(make_stream()), stream_(Stream::cuda(own_stream_.get())) {
    const std::int64_t tokens = input.tokens, rows = ranks * tokens;
    x_ = device.upload(input.x.data(), kShape.dtype, {tokens, kShape.hidden});
    ids_ = device.upload(input.topk_idx.data(), DType::int64, {tokens, kShape.top_k});
    outputs_ = {device.make(kShape.dtype, {rows, kShape.hidden}), device.make(DType::int32, {rows}),
                device.make(DType::int32, {rows, kShape.top_k}),
                device.make(DType::fp32, {rows, kShape.top_k})};
    out_ = device.make(kShape.dtype, {tokens, kShape.hidden});
  }
  void dispatch() {
    HighThroughput::DispatchRequest request;
    request.x = x_;
    request.topk_idx = ids_;
    request.capacity = outputs_.x.size(0);
    request.outputs = outputs_;
    request.stream = stream_;
    handle_ = object_.dispatch(request).handle;
  }
  void combine() {
    HighThroughput::CombineRequest request;
    request.y = outputs_.x;
    request.handle = handle_;
    request.out = out_;
    request.stream = stream_;
    object_.combine(request);
  }
  void synchronize() { stream_.synchronize(); }

 private:
  static std::shared_ptr<CUstream_st> make_stream() {
    int device = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    return make_cuda_stream(device);
  }

  HighThroughput& object_;
  std::shared_ptr<CUstream_st> own_stream_;
  Stream stream_;
  ConstTensorView x_, ids_;
  HighThroughput::Outputs outputs_;
  TensorView out_;
  Handle handle_;
};

TEST(Overlap, TwoLanesRunSideBySideInEveryOrder) {
  const Workload workload({kShape, 2, 3, RoutingPattern::parse("uniform")});
  CommunicatorOptions options = small_arena();
  options.arena_bytes = std::size_t{1} << 30;
  std::array<std::atomic<int>, 4> overlaps{};
  with_thread_ranks(
      2,
      [&](const std::shared_ptr<Communicator>& communicator) {
        const int rank = communicator->rank();
        DeviceTensors device(communicator->cuda_device());
        HighThroughputOptions of{kShape, 2};
        of.sms = 8;  // both lanes fit on the device side by side
        auto object = HighThroughput::create(communicator, of);
        const RankInput first = workload.input(rank, 0), second = workload.input(rank, 1);
        MicroBatch a(*object, device, first, 2), b(*object, device, second, 2);
        auto overlap = [&](auto earlier, auto later) {
          ep::cuda::Trace trace(communicator->cuda_device(), 8);
          communicator->barrier();
          earlier();
          later();
          a.synchronize();
          b.synchronize();
          const auto times = trace.read();
          EXPECT_EQ(times.size(), 2U);
          return std::max(times[0].start_ns, times[1].start_ns) <
                         std::min(times[0].end_ns, times[1].end_ns)
                     ? 1
                     : 0;
        };
        // Dispatches take the lanes in turn, so that a is always on the first and b on the second.
        a.dispatch();
        a.synchronize();
        for (int round = 0; round < 5; ++round) {
          overlaps[0] += overlap([&] { a.combine(); }, [&] { b.dispatch(); });
          overlaps[1] += overlap([&] { b.combine(); }, [&] { a.dispatch(); });
          overlaps[2] += overlap([&] { b.dispatch(); }, [&] { a.combine(); });
          overlaps[3] += overlap([&] { a.dispatch(); }, [&] { b.combine(); });
        }
        a.combine();
        a.synchronize();
      },
      options);
  for (const auto& seen : overlaps) EXPECT_GT(seen, 0);
}

}  // namespace
}  // namespace expertwire::test
