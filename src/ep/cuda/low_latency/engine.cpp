#include "ep/front/low_latency_engine.hpp"

#include <array>

#include "base/check.hpp"
#include "ep/cuda/low_latency/kernels.hpp"
#include "ep/cuda/runtime/block_pool.hpp"
#include "ep/cuda/runtime/runtime.hpp"

namespace expertwire::inline v0::ep {

namespace {

using cuda::BlockPool;
using cuda::Carver;
using cuda::LowLatencyRouting;
using cuda::Runtime;

struct CudaHandle final : LowLatencyHandle {
  std::shared_ptr<std::byte> memory;
  LowLatencyRouting routing{};
};

std::int32_t halves_of(Half half) {
  if (half == Half::both) return cuda::kBothHalves;
  return half == Half::send ? cuda::kSendHalf : cuda::kReceiveHalf;
}

/// Low latency on CUDA: an operation is one launch, a split one two of the same kernel.
class CudaEngine final : public LowLatencyEngine {
 public:
  CudaEngine(Object& object, const LowLatencyOptions& options)
      : runtime_(object, make_region(object, options), options.lanes, options.sms) {
    const int ranks = object.communicator()->size();
    shape_.slots = low_latency_slots(options, ranks);
    rank_ = object.communicator()->rank();
    shape_ = shape_of(options.shape);
    const DeviceGuard guard(runtime_.share().device());
    shape_.shared_bytes = runtime_.share().shared_bytes();
    shape_.bulk = runtime_.share().bulk_copies();
    check(cuda::fewest_shared_bytes(shape_) <= shape_.shared_bytes, ErrorCode::unsupported,
          "shape.experts is {}; device {} has {} bytes of shared memory a block, and to count them "
          "takes {}",
          options.shape.experts, runtime_.share().device(), shape_.shared_bytes,
          cuda::fewest_shared_bytes(shape_));
    check_cuda(cuda::prepare_low_latency(shape_.shared_bytes), "loading the low-latency kernels");
    const std::size_t bytes = carve_routing(nullptr, nullptr);
    for (int l = 0; l < options.lanes; ++l)
      pools_.push_back(std::make_shared<BlockPool>(runtime_.shared_share(), bytes));
  }

  std::shared_ptr<LowLatencyHandle> make_handle(
      int lane, const LowLatency::DispatchRequest& request) override {
    auto handle = std::make_shared<CudaHandle>();
    const cuda::StreamPlace place(runtime_.stream_of(lane, request.stream));
    handle->memory = pools_[static_cast<std::size_t>(lane)]->take(place, request.allocator);
    carve_routing(handle->memory.get(), &handle->routing);
    return handle;
  }

  void dispatch(const Dispatch& work, Half half) override {
    const auto& handle = static_cast<const CudaHandle&>(*work.handle);
    const auto job = Runtime::Job::of(handle.lane, "low-latency dispatch", work.request);
    cuda::LowLatencyDispatchParams p{};
    fill(p, job, handle, half);
    p.shape = shape_of(handle.shape);
    p.call = handle.call(0, work.format);
    p.ids = {work.request.topk_idx.data(), work.request.topk_idx.dtype() == DType::int64};
    p.format = work.format;
    p.cast = work.request.cast_to_fp8;
    p.x = work.request.x.as<std::byte>();
    p.x_scales = work.request.x_scales.as<float>();
    p.topk_weights =
        work.request.topk_weights.present() ? work.request.topk_weights.as<float>() : nullptr;
    p.out_x = work.outputs.x.as<std::byte>();
    p.tokens_per_expert = work.outputs.tokens_per_expert.as<std::int32_t>();
    p.ranges = work.outputs.ranges.as<SourceRange>();
    p.source_tokens = work.outputs.source_tokens.as<std::int32_t>();
    p.out_scales = work.outputs.scales.as<float>();
    const int blocks = runtime_.workers_of(job);
    runtime_.run(job, [&](cudaStream_t stream) {
      check_cuda(cuda::launch(p, {blocks, stream}), "launch of dispatch");
    });
  }

  void combine(const Combine& work, Half half) override {
    const auto& handle = static_cast<const CudaHandle&>(*work.handle);
    const auto job = Runtime::Job::of(handle.lane, "low-latency combine", work.request);
    cuda::LowLatencyCombineParams p{};
    fill(p, job, handle, half);
    MoeShape shape = handle.shape;
    shape.dtype = work.request.y.dtype();
    p.shape = shape_of(shape);
    p.call = handle.call(work.request.topk_weights.present() ? Call::kWeights : 0,
                         RowFormat::of(shape.dtype, shape.hidden));
    p.y = work.request.y.as<std::byte>();
    p.topk_weights =
        work.request.topk_weights.present() ? work.request.topk_weights.as<float>() : nullptr;
    p.bias = work.request.bias.present() ? work.request.bias.as<std::byte>() : nullptr;
    p.out = work.out.as<std::byte>();
    const int blocks = runtime_.workers_of(job);
    runtime_.run(job, [&](cudaStream_t stream) {
      check_cuda(cuda::launch(p, {blocks, stream}), "launch of combine");
    });
  }

  bool drain(Deadline deadline) override { return runtime_.drain(deadline); }
  void check_sms(int sms) const override { runtime_.check_sms(sms); }
  void refresh(Status& status) const override { runtime_.refresh(status, shape_.top_k); }
  Allocator default_allocator() const override { return runtime_.allocator(); }

 private:
  /// What follows from the job and its handle.
  void fill(cuda::LowLatencyParams& p, const Runtime::Job& job, const CudaHandle& handle,
            Half half) const {
    p.context = runtime_.context_of(job);
    p.routing = handle.routing;
    p.tokens = handle.tokens;
    p.halves = halves_of(half);
  }
  /// What kernels are told of a call's shape.
  cuda::LowLatencyShape shape_of(const MoeShape& call) const {
    cuda::LowLatencyShape shape = shape_;
    const auto ranks = static_cast<int>(shape.slots.most.ranks);
    shape.slots = shape.slots.with(slot_sizes(call, ranks));
    shape.placement = {ranks, call.experts};
    shape.top_k = call.top_k;
    shape.width = std::min(call.top_k, ranks);
    shape.turn = rank_ % shape.width;
    shape.by_top_k = Divider(shape.top_k);
    shape.by_width = Divider(shape.width);
    shape.dtype = call.dtype;
    return shape;
  }
  /// Places a handle's arrays, for the most; returns their size.
  std::size_t carve_routing(std::byte* base, LowLatencyRouting* routing) const {
    const SlotSizes& sizes = shape_.slots.most;
    const auto width = static_cast<std::size_t>(shape_.width);
    const std::size_t came = sizes.ranks * sizes.max_tokens * sizes.top_k;
    Carver carver(base);
    LowLatencyRouting r{};
    r.destinations = carver.take<Destination>(sizes.max_tokens * width);
    r.experts = carver.take<std::int32_t>(sizes.max_tokens * sizes.top_k);
    r.epoch = carver.take<Epoch>(1);
    r.rows_from = carver.take<std::int32_t>(sizes.ranks);
    r.copies = carver.take<std::int32_t>(came);
    r.weights = carver.take<float>(came);
    if (routing != nullptr) *routing = r;
    return carver.bytes();
  }

  Runtime runtime_;
  int rank_ = 0;
  cuda::LowLatencyShape shape_{};                  // of the most
  std::vector<std::shared_ptr<BlockPool>> pools_;  // by lane
};

}  // namespace

std::unique_ptr<LowLatencyEngine> make_cuda_engine(Object& object,
                                                   const LowLatencyOptions& options) {
  cuda::check_limits(object, options.shape);
  return std::make_unique<CudaEngine>(object, options);
}

}  // namespace expertwire::ep
