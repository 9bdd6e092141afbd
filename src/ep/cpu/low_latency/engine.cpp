#include "ep/front/low_latency_engine.hpp"

#include <algorithm>

#include "ep/cpu/low_latency/lane.hpp"

namespace expertwire::inline v0::ep {

namespace {

using cpu::LowLatencyLane;

/// Low latency on the CPU: every lane has a team of threads, and its operations run in call order
/// on whatever thread they were given to.
class CpuEngine final : public LowLatencyEngine {
 public:
  CpuEngine(Object& object, const LowLatencyOptions& options) : object_(object) {
    const LowLatencySlots slots = low_latency_slots(options, object.communicator()->size());
    const int workers = team_size(*object.communicator(), options.threads);
    const auto region = make_region(object, options);
    for (int l = 0; l < options.lanes; ++l)
      lanes_.push_back(std::make_unique<LowLatencyLane>(LowLatencyLane::Memory(region, slots, l),
                                                        options.shape, workers));
  }
  bool drain(Deadline deadline) override {
    return std::all_of(lanes_.begin(), lanes_.end(),
                       [&](const auto& lane) { return lane->turnstile().drain(deadline); });
  }

  std::shared_ptr<LowLatencyHandle> make_handle(int, const LowLatency::DispatchRequest&) override {
    return std::make_shared<cpu::LowLatencyHandle>();
  }

  void dispatch(const Dispatch& op, Half half) override {
    LowLatencyLane& lane = lane_of(*op.handle);
    object_.execute({"low-latency dispatch", op.request.stream, op.request.timeout},
                    lane.turnstile(), [this, &lane, op, half](const WaitContext& context) {
                      lane.use(op.handle->shape, op.handle->shape.dtype);
                      if (half != Half::receive) {
                        plan(op);
                        lane.send_dispatch(op, context);
                      }
                      if (half == Half::send) return;
                      lane.receive_dispatch(op, context);
                      object_.note_dropped_rows(
                          static_cast<const cpu::LowLatencyHandle&>(*op.handle).dropped_rows);
                    });
  }

  void combine(const Combine& op, Half half) override {
    LowLatencyLane& lane = lane_of(*op.handle);
    object_.execute({"low-latency combine", op.request.stream, op.request.timeout},
                    lane.turnstile(), [&lane, op, half](const WaitContext& context) {
                      lane.use(op.handle->shape, op.request.y.dtype());
                      if (half != Half::receive) lane.send_combine(op, context);
                      if (half != Half::send) lane.receive_combine(op, context);
                    });
  }

  Allocator default_allocator() const override { return host_allocator(); }

 private:
  /// Where tokens go.
  void plan(const Dispatch& op) {
    const ConstTensorView& given = op.request.topk_idx;
    const ExpertIds ids{given.data(), given.dtype() == DType::int64};
    const MoeShape& shape = op.handle->shape;
    op.handle->route = make_route(ids, op.handle->tokens, shape.top_k,
                                  {object_.communicator()->size(), shape.experts});
    object_.note_invalid_ids(op.handle->route, ids);
  }
  LowLatencyLane& lane_of(const LowLatencyHandle& handle) {
    return *lanes_[static_cast<std::size_t>(handle.lane)];
  }

  Object& object_;
  std::vector<std::unique_ptr<LowLatencyLane>> lanes_;
};

}  // namespace

std::unique_ptr<LowLatencyEngine> make_cpu_engine(Object& object,
                                                  const LowLatencyOptions& options) {
  return std::make_unique<CpuEngine>(object, options);
}

}  // namespace expertwire::ep
