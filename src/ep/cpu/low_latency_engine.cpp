#include "ep/low_latency_engine.hpp"

#include <algorithm>

#include "ep/cpu/low_latency.hpp"

namespace expertwire::ep {

namespace {

using cpu::LowLatencyLane;

/// Low latency on the CPU: every lane has a team of threads, and its operations run in call order
/// on whatever thread they were given to.
class CpuEngine final : public LowLatencyEngine {
 public:
  CpuEngine(Object& object, const LowLatencyOptions& options)
      : object_(object), shape_(options.shape) {
    const LowLatencySlots slots = low_latency_slots(options, object.communicator()->size());
    const int workers = team_size(*object.communicator(), options.threads);
    const auto region = make_region(object, options);
    for (int l = 0; l < options.lanes; ++l)
      lanes_.push_back(std::make_unique<LowLatencyLane>(LowLatencyLane::Memory(region, slots, l),
                                                        shape_, workers));
  }
  bool drain(Deadline deadline) override {
    return std::all_of(lanes_.begin(), lanes_.end(),
                       [&](const auto& lane) { return lane->turnstile().drain(deadline); });
  }

  std::shared_ptr<LowLatencyHandle> make_handle(int, Stream*) override {
    return std::make_shared<cpu::LowLatencyHandle>();
  }

  void dispatch(const Dispatch& work, Half half) override {
    auto handle = std::static_pointer_cast<cpu::LowLatencyHandle>(work.handle);
    LowLatencyLane& lane = lane_of(*handle);
    const LowLatencyLane::Dispatch op{work.x,    work.x_scales, work.topk_weights, work.format,
                                      work.cast, work.outputs,  handle.get()};
    object_.execute(
        {"low-latency dispatch", work.stream, work.timeout}, lane.turnstile(),
        [this, &lane, op, work, half, handle] {
          const auto context = object_.wait_context(work.timeout, "low-latency dispatch");
          if (half != Half::receive) {
            const ExpertIds ids{work.topk_idx.data(), work.topk_idx.dtype() == DType::int64};
            handle->route = make_route(
                ids, handle->tokens, shape_.top_k,
                {static_cast<std::int32_t>(object_.communicator()->size()), shape_.experts});
            object_.note_invalid_ids(handle->route, ids);
            lane.send_dispatch(op, context);
          }
          if (half == Half::send) return;
          lane.receive_dispatch(op, context);
          object_.note_dropped_rows(handle->dropped_rows);
        });
  }

  void combine(const Combine& work, Half half) override {
    auto handle = std::static_pointer_cast<cpu::LowLatencyHandle>(work.handle);
    LowLatencyLane& lane = lane_of(*handle);
    const LowLatencyLane::Combine op{work.y, work.topk_weights, work.bias, work.out, handle.get()};
    object_.execute({"low-latency combine", work.stream, work.timeout}, lane.turnstile(),
                    [this, &lane, op, work, half, handle] {
                      const auto context =
                          object_.wait_context(work.timeout, "low-latency combine");
                      if (half != Half::receive) lane.send_combine(op, context);
                      if (half != Half::send) lane.receive_combine(op, context);
                    });
  }

  const Allocator& default_allocator() const override { return allocator_; }

 private:
  LowLatencyLane& lane_of(const LowLatencyHandle& handle) {
    return *lanes_[static_cast<std::size_t>(handle.lane)];
  }

  Object& object_;
  MoeShape shape_;
  Allocator allocator_ = allocate_host;
  std::vector<std::unique_ptr<LowLatencyLane>> lanes_;
};

}  // namespace

std::unique_ptr<LowLatencyEngine> make_cpu_engine(Object& object,
                                                  const LowLatencyOptions& options) {
  return std::make_unique<CpuEngine>(object, options);
}

}  // namespace expertwire::ep
