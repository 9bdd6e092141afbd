#include "expertwire/high_throughput.hpp"

#include <array>
#include <future>

#include "base/check.hpp"
#include "base/env.hpp"
#include "ep/cpu/high_throughput.hpp"
#include "ep/object.hpp"
#include "ep/validate.hpp"

namespace expertwire {

namespace {

using ep::cpu::HighThroughputHandle;
using ep::cpu::HighThroughputLane;

std::int64_t pool_rows_of(const HighThroughputOptions& options, int ranks) {
  return options.pool_rows > 0 ? options.pool_rows
                               : static_cast<std::int64_t>(ranks) * options.shape.max_tokens;
}

ep::HighThroughputSlots slots_of(const HighThroughputOptions& options, int ranks) {
  ep::SlotSizes sizes;
  sizes.ranks = static_cast<std::uint64_t>(ranks);
  sizes.local_experts = static_cast<std::uint64_t>(options.shape.experts / ranks);
  sizes.max_tokens = static_cast<std::uint64_t>(options.shape.max_tokens);
  sizes.top_k = static_cast<std::uint64_t>(options.shape.top_k);
  sizes.row_bytes = options.shape.row_bytes();
  sizes.pool_rows = static_cast<std::uint64_t>(pool_rows_of(options, ranks));
  return ep::HighThroughputSlots::place(sizes);
}

void check_options(const HighThroughputOptions& options, int ranks) {
  ep::check_shape(options.shape, ranks);
  ep::check_lanes(options.lanes);
  check_argument(options.pool_rows >= 0 && options.pool_rows <= INT32_MAX,
                 "pool_rows is {}; it must be from 0 to {}", options.pool_rows, INT32_MAX);
}

}  // namespace

struct HighThroughput::Impl {
  /// A lane, and what the calling thread knows of the dispatches given to it.
  struct Lane {
    std::unique_ptr<HighThroughputLane> work;
    std::uint64_t dispatches = 0;
    std::array<std::shared_ptr<HighThroughputHandle>, ep::kSlots> last;  // by slot of the pool
  };

  ep::Object object;
  HighThroughputOptions options;
  std::shared_ptr<ep::Region> region;
  std::vector<Lane> lanes;
  std::uint64_t dispatches = 0;

  Impl(const std::shared_ptr<Communicator>& communicator, const HighThroughputOptions& opts);

  int ranks() const { return object.communicator()->size(); }
  int rank() const { return object.communicator()->rank(); }
  std::int64_t pool_rows() const { return pool_rows_of(options, ranks()); }
  Lane& lane_of(const HighThroughputHandle& handle) {
    return lanes[static_cast<std::size_t>(handle.lane)];
  }

  void check_dispatch(const DispatchRequest& request) const;
  void check_pool_slot(Lane& lane, Stream* stream);
  std::shared_ptr<HighThroughputHandle> start_dispatch(const DispatchRequest& request);
  void await_counts(const DispatchRequest& request,
                    const std::shared_ptr<HighThroughputHandle>& handle);
  Outputs make_outputs(const Outputs& given, std::int64_t rows, ep::OutputMaker& maker) const;
};

HighThroughput::Impl::Impl(const std::shared_ptr<Communicator>& communicator,
                           const HighThroughputOptions& opts)
    : object(communicator, "HighThroughput"), options(opts) {
  const MoeShape& shape = options.shape;
  const ep::HighThroughputSlots slots = slots_of(options, ranks());
  const int workers = ep::team_size(*communicator, options.threads);
  const ep::Agreement agreement{1,
                                shape.hidden,
                                shape.experts,
                                shape.top_k,
                                shape.max_tokens,
                                static_cast<std::int32_t>(shape.dtype),
                                options.lanes,
                                Env::get().first_epoch,
                                pool_rows()};
  region = std::make_shared<ep::Region>(
      communicator,
      ep::Region::Request{
          agreement, slots.bytes, slots.flag_bytes(), {slots.dispatch.words, slots.combine.words}});
  lanes.resize(static_cast<std::size_t>(options.lanes));
  for (int l = 0; l < options.lanes; ++l)
    lanes[static_cast<std::size_t>(l)].work = std::make_unique<HighThroughputLane>(
        HighThroughputLane::Memory(region, slots, l), shape, workers);
}

HighThroughput::HighThroughput(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

HighThroughput::~HighThroughput() {
  for (Impl::Lane& lane : impl_->lanes) lane.work->turnstile().drain();
}

std::unique_ptr<HighThroughput> HighThroughput::create(
    const std::shared_ptr<Communicator>& communicator, const HighThroughputOptions& options) {
  check_argument(communicator != nullptr, "HighThroughput::create: communicator is null");
  check_options(options, communicator->size());
  return std::unique_ptr<HighThroughput>(
      new HighThroughput(std::make_unique<Impl>(communicator, options)));
}

std::size_t HighThroughput::memory_bytes(const HighThroughputOptions& options, int ranks) {
  check_options(options, ranks);
  return slots_of(options, ranks).bytes * static_cast<std::size_t>(options.lanes);
}

Status HighThroughput::status() const { return impl_->object.status(); }

// Dispatch -------------------------------------------------------------------------------------

void HighThroughput::Impl::check_dispatch(const DispatchRequest& request) const {
  if (request.cached.valid()) {
    const auto cached = object.own_handle<HighThroughputHandle>(request.cached.state());
    check_argument(!request.topk_idx.present(),
                   "topk_idx and cached are both given; a cached dispatch takes its routing from "
                   "the handle");
    check_argument(!request.capacity.has_value(),
                   "capacity and cached are both given; a cached dispatch has the handle's");
    ep::check_rows("x", request.x, options.shape.dtype, {cached->tokens, options.shape.hidden});
    if (request.topk_weights.present())
      ep::check_tensor("topk_weights", request.topk_weights, DType::fp32,
                       {cached->tokens, options.shape.top_k});
  } else {
    ep::check_dispatch_inputs(options.shape, request.x, request.topk_idx, request.topk_weights);
  }
  if (request.capacity)
    check_argument(*request.capacity >= 0 && *request.capacity <= pool_rows(),
                   "capacity is {}; it must be from 0 to the {} rows of a pool", *request.capacity,
                   pool_rows());
  const Outputs& given = request.outputs;
  const bool any = given.x.present() || given.source_tokens.present() ||
                   given.topk_experts.present() || given.topk_weights.present();
  check_argument(!any || request.output == Output::owned,
                 "outputs are given with Output::pool; the pool is the output");
  check_argument(!any || request.capacity.has_value() || request.cached.valid(),
                 "outputs are given without a capacity; their number of rows must be known before "
                 "the counts are");
}

/// The slot that the next dispatch of the lane fills must not hold rows that somebody still uses.
void HighThroughput::Impl::check_pool_slot(Lane& lane, Stream* stream) {
  auto& before_last = lane.last[lane.dispatches % ep::kSlots];
  if (!before_last || !before_last->in_pool || before_last->release_called) return;
  // If no caller has the handle any more, nobody can release it either.
  check(before_last->held.expired(), ErrorCode::invalid_usage,
        "the pool rows of the dispatch before last of this lane are still held; combine or "
        "release that handle first, or use more lanes");
  before_last->release_called = true;
  object.execute(stream, lane.work->turnstile(),
                 [&lane, epoch = before_last->epoch] { lane.work->release_pool(epoch); });
}

std::shared_ptr<HighThroughputHandle> HighThroughput::Impl::start_dispatch(
    const DispatchRequest& request) {
  Lane& lane = lanes[static_cast<std::size_t>(dispatches % lanes.size())];
  check_pool_slot(lane, request.stream);
  auto handle = std::make_shared<HighThroughputHandle>();
  handle->object = object.id();
  handle->lane = static_cast<int>(dispatches % lanes.size());
  handle->tokens = static_cast<int>(request.x.size(0));
  handle->in_pool = request.output == Output::pool;
  handle->epoch = lane.work->epoch_after(lane.dispatches);
  lane.last[lane.dispatches % ep::kSlots] = handle;
  ++lane.dispatches;
  ++dispatches;
  return handle;
}

/// Queues the exchange of counts (or copies them from the cached handle). Without a capacity the
/// host waits for them, because it has to allocate.
void HighThroughput::Impl::await_counts(const DispatchRequest& request,
                                        const std::shared_ptr<HighThroughputHandle>& handle) {
  auto promise = std::make_shared<std::promise<void>>();
  handle->counted = promise->get_future().share();
  const bool strict = !request.capacity.has_value();
  const std::int64_t capacity = request.capacity.value_or(pool_rows());
  const ep::ExpertIds ids{request.topk_idx.data(), request.topk_idx.dtype() == DType::int64};
  std::shared_ptr<HighThroughputHandle> cached;
  if (request.cached.valid())
    cached = object.own_handle<HighThroughputHandle>(request.cached.state());
  HighThroughputLane& lane = *lane_of(*handle).work;
  // The promise lives in the closure alone: if that is dropped unrun, waiters find it broken.
  object.execute(request.stream, lane.turnstile(),
                 [this, &lane, handle, cached, promise = std::move(promise), strict, capacity, ids,
                  timeout = request.timeout] {
                   const auto context = object.wait_context(timeout, "high-throughput dispatch");
                   if (cached) {
                     handle->adopt(*cached, context);
                   } else {
                     handle->route = ep::make_route(ids, handle->tokens, options.shape.top_k,
                                                    {ranks(), options.shape.experts});
                     object.note_invalid_ids(handle->route, ids);
                     lane.exchange_counts(*handle, capacity, strict, context);
                   }
                   promise->set_value();
                 });
  if (!strict || cached) return;
  try {
    handle->counted.get();
  } catch (const std::future_error&) {
    object.check_usable();
    throw;
  }
}

HighThroughput::Outputs HighThroughput::Impl::make_outputs(const Outputs& given, std::int64_t rows,
                                                           ep::OutputMaker& maker) const {
  const MoeShape& shape = options.shape;
  if (!given.x.present())
    return {maker.make("x", shape.dtype, {rows, shape.hidden}),
            maker.make("source_tokens", DType::int32, {rows}),
            maker.make("topk_experts", DType::int32, {rows, shape.top_k}),
            maker.make("topk_weights", DType::fp32, {rows, shape.top_k})};
  ep::check_rows("outputs.x", given.x, shape.dtype, {rows, shape.hidden});
  ep::check_tensor("outputs.source_tokens", given.source_tokens, DType::int32, {rows});
  ep::check_tensor("outputs.topk_experts", given.topk_experts, DType::int32, {rows, shape.top_k});
  ep::check_tensor("outputs.topk_weights", given.topk_weights, DType::fp32, {rows, shape.top_k});
  return given;
}

HighThroughput::DispatchResult HighThroughput::dispatch(const DispatchRequest& request) {
  Impl& self = *impl_;
  self.object.check_usable();
  self.check_dispatch(request);
  ep::OutputMaker maker(request.allocator);
  DispatchResult result;
  // With a known number of rows outputs are made before anything is sent: bad ones cost nothing.
  const bool owned = request.output == Output::owned;
  std::optional<std::int64_t> rows = request.capacity;
  if (request.cached.valid())
    rows = self.object.own_handle<HighThroughputHandle>(request.cached.state())->output_rows;
  if (owned && rows) result.outputs = self.make_outputs(request.outputs, *rows, maker);

  auto handle = self.start_dispatch(request);
  HighThroughputLane& lane = *self.lane_of(*handle).work;
  self.await_counts(request, handle);
  handle->output_rows = rows.value_or(handle->needed);
  std::exception_ptr refused;  // by the allocator; the other ranks' rows are on their way already
  if (owned && !rows && !handle->overflow) {
    try {
      result.outputs = self.make_outputs({}, handle->output_rows, maker);
    } catch (...) {
      refused = std::current_exception();
    }
  }
  const HighThroughputLane::Dispatch op{request.x, request.topk_weights, result.outputs, handle};
  self.object.execute(request.stream, lane.turnstile(),
                      [&self, &lane, op, owner = maker.owner(), timeout = request.timeout] {
                        const auto context =
                            self.object.wait_context(timeout, "high-throughput dispatch");
                        lane.send_rows(op, context);
                        lane.receive_rows(op, context);
                      });
  if (refused) std::rethrow_exception(refused);
  check(rows || !handle->overflow, ErrorCode::capacity,
        "a rank's pool of {} rows is too small for the rows that this dispatch brings (this rank "
        "needs {}); raise pool_rows or give a capacity",
        self.pool_rows(), handle->needed);

  if (!owned) result.outputs = lane.pool_view(handle->epoch, handle->output_rows);
  result.owner = maker.owner();
  result.handle = Handle(handle);
  result.needed_rows = TensorView(&handle->needed, DType::int32, {1});
  if (!rows || request.stream == nullptr) {
    result.rows_per_expert = handle->rows_per_expert;
    for (int source = 0; source < self.ranks(); ++source)
      result.rows_per_source.push_back(
          static_cast<std::int32_t>(handle->rows_between(source, self.rank())));
  }
  return result;
}

// Combine --------------------------------------------------------------------------------------

HighThroughput::CombineResult HighThroughput::combine(const CombineRequest& request) {
  Impl& self = *impl_;
  self.object.check_usable();
  const MoeShape& shape = self.options.shape;
  auto handle = self.object.own_handle<HighThroughputHandle>(request.handle.state());
  check(!(handle->in_pool && handle->release_called &&
          request.y.data() == self.lane_of(*handle).work->pool_view(handle->epoch, 0).x.data()),
        ErrorCode::invalid_usage,
        "y lies in pool rows that this handle has released already; combine such rows once");
  const std::int64_t rows = handle->output_rows;
  ep::check_rows("y", request.y, shape.dtype, {rows, shape.hidden});
  if (request.topk_weights.present())
    ep::check_tensor("topk_weights", request.topk_weights, DType::fp32, {rows, shape.top_k});
  if (request.bias.present())
    ep::check_rows("bias", request.bias, shape.dtype, {handle->tokens, shape.hidden});
  if (request.out.present())
    ep::check_rows("out", request.out, shape.dtype, {handle->tokens, shape.hidden});
  if (request.out_topk_weights.present())
    ep::check_tensor("out_topk_weights", request.out_topk_weights, DType::fp32,
                     {handle->tokens, shape.top_k});

  ep::OutputMaker maker(request.allocator);
  CombineResult result;
  result.out = request.out.present()
                   ? request.out
                   : maker.make("out", shape.dtype, {handle->tokens, shape.hidden});
  result.topk_weights = request.out_topk_weights;
  if (request.topk_weights.present() && !result.topk_weights.present())
    result.topk_weights =
        maker.make("out_topk_weights", DType::fp32, {handle->tokens, shape.top_k});
  result.owner = maker.owner();

  HighThroughputLane& lane = *self.lane_of(*handle).work;
  const HighThroughputLane::Combine op{request.y,  request.topk_weights, request.bias,
                                       result.out, result.topk_weights,  handle};
  handle->release_called = true;
  self.object.execute(
      request.stream, lane.turnstile(), [&self, &lane, op, timeout = request.timeout] {
        const auto context = self.object.wait_context(timeout, "high-throughput combine");
        lane.send_combine(op, context);
        lane.receive_combine(op, context);
      });
  return result;
}

void HighThroughput::release(const Handle& handle, Stream* stream) {
  Impl& self = *impl_;
  self.object.check_usable();
  auto state = self.object.own_handle<HighThroughputHandle>(handle.state());
  if (!state->in_pool || state->release_called) return;
  state->release_called = true;
  HighThroughputLane& lane = *self.lane_of(*state).work;
  self.object.execute(stream, lane.turnstile(),
                      [&lane, epoch = state->epoch] { lane.release_pool(epoch); });
}

}  // namespace expertwire
