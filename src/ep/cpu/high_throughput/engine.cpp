#include "ep/front/high_throughput_engine.hpp"

#include <algorithm>

#include "base/check.hpp"
#include "ep/cpu/high_throughput/lane.hpp"

namespace expertwire::inline v0::ep {

namespace {

using cpu::HighThroughputLane;
using CpuHandle = cpu::HighThroughputHandle;

/// High throughput on the CPU: every lane has a team of threads, and its operations run in call
/// order on whatever thread they were given to.
class CpuEngine final : public HighThroughputEngine {
 public:
  CpuEngine(Object& object, const HighThroughputOptions& options)
      : object_(object), lanes_(static_cast<std::size_t>(options.lanes)) {
    const auto slots = high_throughput_slots(options, object.communicator()->size());
    const int workers = team_size(*object.communicator(), options.threads);
    const auto region = make_region(object, options);
    for (int l = 0; l < options.lanes; ++l)
      lanes_[static_cast<std::size_t>(l)].work = std::make_unique<HighThroughputLane>(
          HighThroughputLane::Memory(region, slots, l), options.shape, workers);
  }
  bool drain(Deadline deadline) override {
    return std::all_of(lanes_.begin(), lanes_.end(),
                       [&](const Lane& lane) { return lane.work->turnstile().drain(deadline); });
  }

  HandlePointer make_handle(int lane, const HandlePointer&,
                            const HighThroughput::DispatchRequest&) override {
    auto handle = std::make_shared<CpuHandle>();
    Lane& of = lanes_[static_cast<std::size_t>(lane)];
    handle->epoch = of.work->epoch_after(of.dispatches++);
    return handle;
  }

  void plan(const Dispatch& work) override;
  void dispatch(const Dispatch& op) override {
    HighThroughputLane& lane = lane_of(*op.handle);
    object_.execute({"high-throughput dispatch", op.request.stream, op.request.timeout},
                    lane.turnstile(), [&lane, op](const WaitContext& context) {
                      lane.use(op.handle->shape, op.handle->shape.dtype);
                      lane.dispatch(op, context);
                    });
  }
  void combine(const Combine& op) override {
    HighThroughputLane& lane = lane_of(*op.handle);
    object_.execute({"high-throughput combine", op.request.stream, op.request.timeout},
                    lane.turnstile(), [&lane, op](const WaitContext& context) {
                      lane.use(op.handle->shape, op.request.y.dtype());
                      lane.combine(op, context);
                    });
  }
  void release(const HandlePointer& handle, const Stream& stream) override {
    const auto& mine = static_cast<const CpuHandle&>(*handle);
    HighThroughputLane& lane = lane_of(mine);
    object_.execute({"release", stream, {}}, lane.turnstile(),
                    [&lane, epoch = mine.epoch](const WaitContext&) { lane.release_pool(epoch); });
  }

  HighThroughput::Outputs pool_view(const HighThroughputHandle& handle,
                                    std::int64_t rows) const override {
    const auto& mine = static_cast<const CpuHandle&>(handle);
    return lane_of(mine).pool_view(mine, rows);
  }
  TensorView needed_rows(HighThroughputHandle& handle) const override {
    return {&static_cast<CpuHandle&>(handle).came, DType::int32, {1}};
  }
  Offsets offsets(HighThroughputHandle& handle) const override {
    auto& mine = static_cast<CpuHandle&>(handle);
    const auto view = [](std::vector<std::int32_t>& values) {
      return values.empty() ? TensorView()
                            : TensorView(values.data(), DType::int32,
                                         {static_cast<std::int64_t>(values.size())});
    };
    return {view(mine.source_offsets), view(mine.expert_offsets), view(mine.group_offsets)};
  }
  void learn_counts(HighThroughputHandle& handle) const override {
    const auto& mine = static_cast<const CpuHandle&>(handle);
    handle.needed = mine.came;
    handle.overflow = mine.too_many;
    handle.rows_per_expert = mine.selections_per_expert;
    handle.rows_per_source.clear();
    const Communicator& communicator = *object_.communicator();
    for (int source = 0; source < communicator.size(); ++source)
      handle.rows_per_source.push_back(
          static_cast<std::int32_t>(mine.rows_between(source, communicator.rank())));
  }
  Allocator default_allocator() const override { return host_allocator(); }

 private:
  void await_counts(const CpuHandle& handle, const Dispatch& work) const;
  struct Lane {
    std::unique_ptr<HighThroughputLane> work;
    std::uint64_t dispatches = 0;
  };
  HighThroughputLane& lane_of(const HandleState& handle) const {
    return *lanes_[static_cast<std::size_t>(handle.lane)].work;
  }

  Object& object_;
  std::vector<Lane> lanes_;
};

void CpuEngine::plan(const Dispatch& work) {
  auto handle = std::static_pointer_cast<CpuHandle>(work.handle);
  auto promise = std::make_shared<std::promise<void>>();
  handle->counted = promise->get_future().share();
  handle->source_offsets.assign(static_cast<std::size_t>(object_.communicator()->size()) + 1, 0);
  if (handle->grouped) {
    const int local = handle->shape.experts / object_.communicator()->size();
    handle->expert_offsets.assign(static_cast<std::size_t>(local) + 1, 0);
    handle->group_offsets = handle->expert_offsets;
  }
  HighThroughputLane& lane = lane_of(*handle);
  // The promise lives in the closure alone: if that is dropped unrun, waiters find it broken.
  object_.execute(
      {"high-throughput dispatch", work.request.stream, work.request.timeout}, lane.turnstile(),
      [this, &lane, handle, promise = std::move(promise), work](const WaitContext& context) {
        lane.use(handle->shape, handle->shape.dtype);
        if (work.cached) {
          handle->adopt(static_cast<const CpuHandle&>(*work.cached), context);
          lane.exchange_calls(*handle, work.call_options(), context);
        } else {
          const ConstTensorView& given = work.request.topk_idx;
          const ExpertIds ids{given.data(), given.dtype() == DType::int64};
          handle->route = make_route(ids, handle->tokens, handle->shape.top_k,
                                     {object_.communicator()->size(), handle->shape.experts});
          object_.note_invalid_ids(handle->route, ids);
          lane.exchange_counts(*handle, handle->room, work.call_options(), context);
        }
        promise->set_value();
      });
  if (work.cached) {
    // What the caller of that dispatch has been told is true of this one, too.
    handle->rows_per_source = work.cached->rows_per_source;
    handle->rows_per_expert = work.cached->rows_per_expert;
    handle->needed = work.cached->needed;
  }
  if (!work.eager()) return;
  await_counts(*handle, work);
  learn_counts(*handle);
}

/// Waits for the counts of a dispatch that may be queued on a stream.
void CpuEngine::await_counts(const CpuHandle& handle, const Dispatch& work) const {
  const Deadline deadline = object_.late_deadline(work.request.timeout);
  try {
    if (handle.counted.wait_for(deadline.remaining()) == std::future_status::ready)
      return handle.counted.get();
  } catch (const std::future_error&) {
    object_.check_usable();
    throw;
  }
  const Error error(
      ErrorCode::timeout,
      fmt::format("high-throughput dispatch waited {} ms for its counts; is its stream held up by "
                  "other work?",
                  deadline.budget().count()),
      {object_.communicator()->rank(), -1, Phase::counts});
  object_.fail(error);
  throw error;
}

}  // namespace

std::unique_ptr<HighThroughputEngine> make_cpu_engine(Object& object,
                                                      const HighThroughputOptions& options) {
  return std::make_unique<CpuEngine>(object, options);
}

}  // namespace expertwire::ep
