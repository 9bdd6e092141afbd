#include "expertwire/high_throughput.hpp"

#include <array>

#include "base/check.hpp"
#include "ep/front/high_throughput_engine.hpp"
#include "ep/front/validate.hpp"

namespace expertwire::inline v0 {

namespace ep {

HighThroughputSlots high_throughput_slots(const HighThroughputOptions& options, int ranks) {
  SlotSizes sizes = slot_sizes(options.shape, ranks);
  sizes.pool_rows = static_cast<std::uint64_t>(options.pool_rows);
  sizes.scales = scales_of(static_cast<int>(sizes.row_bytes));  // of fp8 rows that fill a row
  const std::uint32_t frames = options.ring_frames > 0
                                   ? static_cast<std::uint32_t>(options.ring_frames)
                                   : HighThroughputSlots::frames_for(sizes, options.lanes);
  return HighThroughputSlots::place(sizes, frames);
}

std::shared_ptr<Region> make_region(const Object& object, const HighThroughputOptions& options) {
  const auto staged = object.communicator()->staged_pair();
  check(!staged || options.pool_rows == 0, ErrorCode::unsupported,
        "pool_rows is {}; ranks {} and {} reach each other through host memory, and rows of a pool "
        "are written and read by load and store: it must be 0 (see doctor)",
        options.pool_rows, staged ? staged->first : 0, staged ? staged->second : 0);
  Agreement agreement = agreement_on(1, options.shape, options.lanes);
  agreement.pool_rows = options.pool_rows;
  agreement.ring_frames = options.ring_frames;
  return std::make_shared<Region>(
      object.communicator(),
      Region::Request::of(agreement,
                          high_throughput_slots(options, object.communicator()->size())));
}

HighThroughputOptions completed(const HighThroughputOptions& options, int ranks) {
  check_argument(
      options.pool_rows >= HighThroughputOptions::kEveryRow && options.pool_rows <= INT32_MAX,
      "pool_rows is {}; it must be from 0 to {}, or kEveryRow", options.pool_rows, INT32_MAX);
  HighThroughputOptions all = options;
  if (ranks >= 1 && options.shape.max_tokens == 0 && options.pool_rows == 0)
    all.shape.max_tokens = std::min(kMostTokens, INT32_MAX / ranks);
  check_shape(all.shape, ranks);
  check_lanes(options.lanes);
  const int frames = options.ring_frames;
  check_argument(frames == 0 || (frames >= kFewestFrames && frames <= kMostFrames &&
                                 (frames & (frames - 1)) == 0),
                 "ring_frames is {}; it must be a power of two from {} to {}, or 0", frames,
                 kFewestFrames, kMostFrames);
  if (options.pool_rows == HighThroughputOptions::kEveryRow)
    all.pool_rows = static_cast<std::int64_t>(ranks) * options.shape.max_tokens;
  return all;
}

}  // namespace ep

namespace {

using ep::HighThroughputHandle;

}  // namespace

struct HighThroughput::Impl {
  /// What the calling thread knows of the dispatches given to a lane.
  struct Lane {
    std::uint64_t dispatches = 0;
    std::array<std::shared_ptr<HighThroughputHandle>, ep::kSlots> last;  // by slot of the pool
  };

  ep::Object object;
  HighThroughputOptions options;
  bool has_max_tokens;  ///< the caller gave one
  std::unique_ptr<ep::HighThroughputEngine> engine;
  std::vector<Lane> lanes;
  std::uint64_t dispatches = 0;

  Impl(const std::shared_ptr<Communicator>& communicator, const HighThroughputOptions& opts)
      : object(communicator, "HighThroughput"),
        options(ep::completed(opts, communicator->size())),
        has_max_tokens(opts.shape.max_tokens > 0),
        engine(communicator->cuda_device() >= 0 ? ep::make_cuda_engine(object, options)
                                                : ep::make_cpu_engine(object, options)),
        lanes(static_cast<std::size_t>(options.lanes)) {}

  int ranks() const { return object.communicator()->size(); }
  std::int64_t every_row() const {
    return static_cast<std::int64_t>(ranks()) * options.shape.max_tokens;
  }
  Allocator allocator_of(const Allocator& given) const {
    return given ? given : engine->default_allocator();
  }

  ep::RowFormat check_dispatch(const DispatchRequest& request, ep::Geometry& geometry) const;
  void check_layout(const DispatchRequest& request) const;
  void check_capacity(const DispatchRequest& request, const MoeShape& call) const;
  void check_pool_slot(Lane& lane, const Stream& stream);
  std::shared_ptr<HighThroughputHandle> start_dispatch(
      const DispatchRequest& request, const std::shared_ptr<HighThroughputHandle>& cached);
  /// What outputs follow from.
  struct OutputSizes {
    const MoeShape& shape;
    const ep::RowFormat& format;
    bool grouped;
    std::int64_t rows;
  };
  static Outputs make_outputs(const Outputs& given, const OutputSizes& sizes,
                              ep::OutputMaker& maker);
  void check_combine(const CombineRequest& request, const HighThroughputHandle& handle) const;
};

HighThroughput::HighThroughput(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
HighThroughput::~HighThroughput() { ep::let_go(std::move(impl_)); }

std::unique_ptr<HighThroughput> HighThroughput::create(
    const std::shared_ptr<Communicator>& communicator, const HighThroughputOptions& options) {
  check_argument(communicator != nullptr, "HighThroughput::create: communicator is null");
  return std::unique_ptr<HighThroughput>(
      new HighThroughput(std::make_unique<Impl>(communicator, options)));
}

std::size_t HighThroughput::memory_bytes(const HighThroughputOptions& options, int ranks) {
  return ep::high_throughput_slots(ep::completed(options, ranks), ranks).bytes *
         static_cast<std::size_t>(options.lanes);
}

Status HighThroughput::status() const {
  Status status = impl_->object.status();
  impl_->engine->refresh(status);
  return status;
}

// Dispatch -------------------------------------------------------------------------------------

/// Fills in the sizes of the call; returns the format of the rows.
ep::RowFormat HighThroughput::Impl::check_dispatch(const DispatchRequest& request,
                                                   ep::Geometry& geometry) const {
  const ep::RowFormat format = ep::check_rows_in(geometry, {request.x, request.x_scales, false});
  if (request.cached.valid()) {
    const auto cached = object.own_handle<HighThroughputHandle>(request.cached);
    check_argument(!request.topk_idx.present(),
                   "topk_idx and cached are both given; a cached dispatch takes its routing from "
                   "the handle");
    check_argument(!request.capacity.has_value(),
                   "capacity and cached are both given; a cached dispatch has the handle's");
    check_argument(
        request.experts == 0 || request.experts == cached->shape.experts,
        "experts is {}, but the cached handle has {}; a cached dispatch has the handle's",
        request.experts, cached->shape.experts);
    check_argument(request.output != Output::pool || cached->room <= options.pool_rows,
                   "cached is the handle of a dispatch whose output had room for {} rows, and the "
                   "pool has {}; own the output, or make a larger pool",
                   cached->room, options.pool_rows);
    geometry.call.experts = cached->shape.experts;
    geometry.call.top_k = cached->shape.top_k;
    ep::check_rows("x", request.x, request.x.dtype(), {cached->tokens, geometry.call.hidden});
    if (request.topk_weights.present())
      ep::check_tensor("topk_weights", request.topk_weights, DType::fp32,
                       {cached->tokens, cached->shape.top_k});
  } else {
    ep::check_experts(geometry, request.experts);
    ep::check_routing(geometry, request.x.size(0), request.topk_idx, request.topk_weights);
  }
  ep::check_stream(*object.communicator(), request.stream);
  engine->check_sms(request.sms);
  if (engine->captures(request.stream)) {
    check(request.cached.valid() || request.capacity.has_value(), ErrorCode::invalid_usage,
          "dispatch on a capturing stream needs a capacity: without one the host waits for counts");
    check(request.output == Output::owned, ErrorCode::invalid_usage,
          "dispatch on a capturing stream needs Output::owned: the pool's rows change places from "
          "one replay to the next");
  }
  check_argument(request.output != Output::pool || options.pool_rows > 0,
                 "output is Output::pool, but the object was made without a pool; make it with "
                 "pool_rows, or own the output");
  check_layout(request);
  check_capacity(request, geometry.call);
  const Outputs& given = request.outputs;
  const bool any = given.x.present() || given.source_tokens.present() ||
                   given.topk_experts.present() || given.topk_weights.present() ||
                   given.scales.present();
  check_argument(!any || request.output == Output::owned,
                 "outputs are given with Output::pool; the pool is the output");
  check_argument(!any || request.capacity.has_value() || request.cached.valid(),
                 "outputs are given without a capacity; their number of rows must be known before "
                 "the counts are");
  return format;
}

void HighThroughput::Impl::check_layout(const DispatchRequest& request) const {
  check_argument(request.layout == Layout::token_major || request.layout == Layout::expert_major,
                 "layout is {}; it must be Layout::token_major or Layout::expert_major",
                 static_cast<int>(request.layout));
  constexpr int kMostAlignment = 512;
  check_argument(request.expert_alignment >= 1 && request.expert_alignment <= kMostAlignment,
                 "expert_alignment is {}; it must be from 1 to {}", request.expert_alignment,
                 kMostAlignment);
  const bool grouped = request.cached.valid()
                           ? object.own_handle<HighThroughputHandle>(request.cached)->grouped
                           : request.layout == Layout::expert_major;
  check_argument(!grouped || request.output == Output::owned,
                 "output is Output::pool and layout is Layout::expert_major; rows that are grouped "
                 "by expert are copied to their places: own the output");
}

void HighThroughput::Impl::check_capacity(const DispatchRequest& request,
                                          const MoeShape& call) const {
  if (!request.capacity) return;
  const bool pool = request.output == Output::pool;
  std::int64_t most = pool ? options.pool_rows : every_row();
  if (request.layout == Layout::expert_major) {
    check_argument(
        has_max_tokens,
        "capacity is {} and layout is Layout::expert_major, but the object was made "
        "without shape.max_tokens: where the rows of R*M tokens lie must be kept; make it "
        "with an M, or give no capacity",
        *request.capacity);
    const std::int64_t alignment = request.expert_alignment, groups = call.experts / ranks();
    most = (most * call.top_k + groups * (alignment - 1) + alignment - 1) / alignment * alignment;
  }
  most = std::min<std::int64_t>(most, INT32_MAX);
  check_argument(*request.capacity >= 0 && *request.capacity <= most,
                 "capacity is {}; it must be from 0 to the {} rows {}", *request.capacity, most,
                 pool ? "of a pool" : "that all tokens of all ranks make");
}

/// The slot that the next dispatch of the lane fills must not hold rows that somebody still uses.
void HighThroughput::Impl::check_pool_slot(Lane& lane, const Stream& stream) {
  // What is captured is done again by every replay; credit for these rows is granted once.
  if (engine->captures(stream))
    for (const auto& earlier : lane.last) {
      if (!earlier || !earlier->in_pool || earlier->release_called) continue;
      check(earlier->held.expired(), ErrorCode::invalid_usage,
            "pool rows of an earlier dispatch of this lane are still held; combine or release them "
            "before a capture");
      earlier->release_called = true;
      engine->release(earlier, {});  // now, not by every replay
    }
  auto& before_last = lane.last[lane.dispatches % ep::kSlots];
  if (!before_last || !before_last->in_pool || before_last->release_called) return;
  // If no caller has the handle any more, nobody can release it either.
  check(before_last->held.expired(), ErrorCode::invalid_usage,
        "the pool rows of the dispatch before last of this lane are still held; combine or "
        "release that handle first, or use more lanes");
  before_last->release_called = true;
  engine->release(before_last, stream);
}

std::shared_ptr<HighThroughputHandle> HighThroughput::Impl::start_dispatch(
    const DispatchRequest& request, const std::shared_ptr<HighThroughputHandle>& cached) {
  const int number = static_cast<int>(dispatches % lanes.size());
  Lane& lane = lanes[static_cast<std::size_t>(number)];
  check_pool_slot(lane, request.stream);
  auto handle = engine->make_handle(number, cached, request);
  handle->object = object.id();
  handle->lane = number;
  handle->tokens = static_cast<int>(request.x.size(0));
  handle->in_pool = request.output == Output::pool;
  handle->grouped = cached ? cached->grouped : request.layout == Layout::expert_major;
  handle->alignment = cached ? cached->alignment : request.expert_alignment;
  // Handles of owned output are the caller's alone: their memory goes back when the caller's do.
  auto& last = lane.last[lane.dispatches % ep::kSlots];
  last = handle->in_pool ? handle : nullptr;
  ++lane.dispatches;
  ++dispatches;
  return handle;
}

HighThroughput::Outputs HighThroughput::Impl::make_outputs(const Outputs& given,
                                                           const OutputSizes& sizes,
                                                           ep::OutputMaker& maker) {
  const auto& [shape, format, grouped, rows] = sizes;
  const auto per_row = [&, rows = rows, grouped = grouped, top_k = shape.top_k](const char* name,
                                                                                DType dtype) {
    return grouped ? maker.make(name, dtype, {rows}) : maker.make(name, dtype, {rows, top_k});
  };
  if (!given.x.present())
    return {maker.make("x", format.dtype, {rows, shape.hidden}),
            maker.make("source_tokens", DType::int32, {rows}),
            per_row("topk_experts", DType::int32), per_row("topk_weights", DType::fp32),
            format.scales > 0 ? maker.make("scales", format.scale_dtype(), {rows, format.scales})
                              : TensorView()};
  ep::check_rows("outputs.x", given.x, format.dtype, {rows, shape.hidden});
  ep::check_scales_out(given.scales, format, {rows, format.scales});
  ep::check_tensor("outputs.source_tokens", given.source_tokens, DType::int32, {rows});
  ep::check_per_row("outputs.topk_experts", given.topk_experts, DType::int32,
                    {rows, shape.top_k, grouped});
  ep::check_per_row("outputs.topk_weights", given.topk_weights, DType::fp32,
                    {rows, shape.top_k, grouped});
  return given;
}

HighThroughput::DispatchResult HighThroughput::dispatch(const DispatchRequest& request) {
  Impl& self = *impl_;
  self.object.check_usable();
  ep::Geometry geometry(self.options.shape, self.ranks());
  const ep::RowFormat format = self.check_dispatch(request, geometry);
  const MoeShape& shape = geometry.call;
  ep::OutputMaker maker(self.allocator_of(request.allocator));
  DispatchResult result;
  // With a known number of rows outputs are made before anything is sent: bad ones cost nothing.
  const bool owned = request.output == Output::owned;
  std::shared_ptr<HighThroughputHandle> cached;
  std::optional<std::int64_t> rows = request.capacity;
  if (request.cached.valid()) {
    cached = self.object.own_handle<HighThroughputHandle>(request.cached);
    rows = cached->output_rows;
  }
  const bool grouped = cached ? cached->grouped : request.layout == Layout::expert_major;
  if (owned && rows)
    result.outputs = Impl::make_outputs(request.outputs, {shape, format, grouped, *rows}, maker);
  const Outputs& out = result.outputs;
  ep::check_memory(*self.object.communicator(),
                   {{"outputs.x", out.x},
                    {"outputs.source_tokens", out.source_tokens},
                    {"outputs.topk_experts", out.topk_experts},
                    {"outputs.topk_weights", out.topk_weights},
                    {"outputs.scales", out.scales}},
                   {{"x", request.x},
                    {"x_scales", request.x_scales},
                    {"topk_idx", request.topk_idx},
                    {"topk_weights", request.topk_weights}});

  auto handle = self.start_dispatch(request, cached);
  handle->format = format;
  handle->shape = shape;
  ep::HighThroughputEngine::Dispatch work{request, handle, cached, result.outputs, maker.owner()};
  // Tokens that come, of which a grouped output clips the rows.
  const std::int64_t every = owned ? self.every_row() : self.options.pool_rows;
  handle->room = cached ? cached->room : grouped ? every : request.capacity.value_or(every);
  work.request.cached = {};  // queued work is no caller that holds rows
  self.engine->plan(work);
  handle->output_rows = rows.value_or(handle->needed);
  std::exception_ptr refused;  // by the allocator; the other ranks' rows are on their way already
  if (owned && !rows && !handle->overflow) {
    try {
      result.outputs = Impl::make_outputs({}, {shape, format, grouped, handle->output_rows}, maker);
    } catch (...) {
      refused = std::current_exception();
    }
  }
  work.outputs = result.outputs;
  self.engine->dispatch(work);
  if (refused) std::rethrow_exception(refused);
  check(rows || !handle->overflow, ErrorCode::capacity,
        "a rank's pool of {} rows is too small for the rows that this dispatch brings (this rank "
        "needs {}); raise pool_rows or give a capacity",
        self.options.pool_rows, handle->needed);

  if (!owned) result.outputs = self.engine->pool_view(*handle, handle->output_rows);
  result.owner = maker.owner();
  result.handle = ep::HandleAccess::make(handle);
  result.needed_rows = self.engine->needed_rows(*handle);
  const auto offsets = self.engine->offsets(*handle);
  result.source_offsets = offsets.sources;
  result.expert_offsets = offsets.experts;
  result.group_offsets = offsets.groups;
  if (rows && !request.stream.present()) self.engine->learn_counts(*handle);
  result.rows_per_expert = handle->rows_per_expert;
  result.rows_per_source = handle->rows_per_source;
  return result;
}

// Combine --------------------------------------------------------------------------------------

void HighThroughput::Impl::check_combine(const CombineRequest& request,
                                         const HighThroughputHandle& handle) const {
  const MoeShape& shape = handle.shape;
  check(!(handle.in_pool && handle.release_called &&
          request.y.data() == engine->pool_view(handle, 0).x.data()),
        ErrorCode::invalid_usage,
        "y lies in pool rows that this handle has released already; combine such rows once");
  const std::int64_t rows = handle.output_rows;
  const DType dtype = ep::check_rows_home(options.shape, request.y, {rows, shape.hidden});
  if (request.topk_weights.present())
    ep::check_per_row("topk_weights", request.topk_weights, DType::fp32,
                      {rows, shape.top_k, handle.grouped});
  check_argument(
      handle.grouped || !request.row_weights.present(),
      "row_weights are given, but the rows of the handle are token-major: they have been "
      "summed over experts already");
  if (request.row_weights.present())
    ep::check_tensor("row_weights", request.row_weights, DType::fp32, {rows});
  if (request.bias.present())
    ep::check_rows("bias", request.bias, dtype, {handle.tokens, shape.hidden});
  if (request.out.present())
    ep::check_rows("out", request.out, dtype, {handle.tokens, shape.hidden});
  if (request.out_topk_weights.present())
    ep::check_tensor("out_topk_weights", request.out_topk_weights, DType::fp32,
                     {handle.tokens, shape.top_k});
  ep::check_stream(*object.communicator(), request.stream);
  engine->check_sms(request.sms);
  check(!handle.in_pool || !engine->captures(request.stream), ErrorCode::invalid_usage,
        "combine of a pool dispatch on a capturing stream: its rows are given back once, not by "
        "every replay; use Output::owned in captures");
}

HighThroughput::CombineResult HighThroughput::combine(const CombineRequest& request) {
  Impl& self = *impl_;
  self.object.check_usable();
  auto handle = self.object.own_handle<HighThroughputHandle>(request.handle);
  const MoeShape& shape = handle->shape;
  self.check_combine(request, *handle);

  ep::OutputMaker maker(self.allocator_of(request.allocator));
  CombineResult result;
  result.out = request.out.present()
                   ? request.out
                   : maker.make("out", request.y.dtype(), {handle->tokens, shape.hidden});
  result.topk_weights = request.out_topk_weights;
  if (request.topk_weights.present() && !result.topk_weights.present())
    result.topk_weights =
        maker.make("out_topk_weights", DType::fp32, {handle->tokens, shape.top_k});
  result.owner = maker.owner();
  // A sum may take the place of its initial value.
  const bool over_bias = result.out.data() == request.bias.data();
  ep::check_memory(*self.object.communicator(),
                   {{"out", result.out}, {"out_topk_weights", result.topk_weights}},
                   {{"y", request.y},
                    {"row_weights", request.row_weights},
                    {"topk_weights", request.topk_weights},
                    {"bias", over_bias ? ConstTensorView() : request.bias}});
  ep::HighThroughputEngine::Combine work{request, handle, result.out, result.topk_weights,
                                         result.owner};
  work.request.handle = {};  // as in dispatch
  self.engine->combine(work);
  handle->release_called = true;
  return result;
}

void HighThroughput::release(const Handle& handle, const Stream& stream) {
  Impl& self = *impl_;
  self.object.check_usable();
  ep::check_stream(*self.object.communicator(), stream);
  auto state = self.object.own_handle<HighThroughputHandle>(handle);
  if (!state->in_pool || state->release_called) return;
  check(!self.engine->captures(stream), ErrorCode::invalid_usage,
        "release on a capturing stream; pool rows are given back once, not by every replay");
  state->release_called = true;
  self.engine->release(state, stream);
}

}  // namespace expertwire
