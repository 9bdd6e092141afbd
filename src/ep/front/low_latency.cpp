#include "expertwire/low_latency.hpp"

#include "base/check.hpp"
#include "ep/front/low_latency_engine.hpp"
#include "ep/front/validate.hpp"

namespace expertwire::inline v0 {

namespace ep {

LowLatencySlots low_latency_slots(const LowLatencyOptions& options, int ranks) {
  return LowLatencySlots::place(slot_sizes(options.shape, ranks));
}

std::shared_ptr<Region> make_region(const Object& object, const LowLatencyOptions& options) {
  const LowLatencySlots slots = low_latency_slots(options, object.communicator()->size());
  return std::make_shared<Region>(
      object.communicator(),
      Region::Request::of(agreement_on(0, options.shape, options.lanes), slots));
}

}  // namespace ep

namespace {

void check_options(const LowLatencyOptions& options, int ranks) {
  ep::check_shape(options.shape, ranks);
  check_argument(
      static_cast<std::int64_t>(options.shape.experts) * options.shape.max_tokens <= INT32_MAX,
      "shape.experts {} times shape.max_tokens {} is more than {} output rows",
      options.shape.experts, options.shape.max_tokens, INT32_MAX);
  ep::check_lanes(options.lanes);
}

/// The operations of one direction of a lane that have been called.
struct Calls {
  std::uint64_t sent = 0;
  std::uint64_t received = 0;

  /// A send needs the slot of the operation two before, whose receive half must be on its way.
  void check_send(const char* operation) const {
    check(sent - received < ep::kSlots, ErrorCode::invalid_usage,
          "{}: two send halves of this lane wait for their receive half; call receive() of the "
          "earlier one first",
          operation);
  }
  void check_receive(const char* operation, std::uint64_t number) const {
    check(received == number, ErrorCode::invalid_usage,
          "{}: receive halves of a lane are called in the order of their send halves, once each; "
          "this is number {}, the next is {}",
          operation, number, received);
  }
  /// Counts an operation, or its send half alone; returns its number.
  std::uint64_t count(bool send_only) {
    if (!send_only) ++received;
    return sent++;
  }
};

}  // namespace

struct LowLatency::Impl {
  struct Lane {
    Calls dispatch, combine;
  };

  ep::Object object;
  LowLatencyOptions options;
  std::unique_ptr<ep::LowLatencyEngine> engine;
  std::vector<Lane> lanes;
  std::uint64_t dispatches = 0;

  Impl(const std::shared_ptr<Communicator>& communicator, const LowLatencyOptions& opts)
      : object(communicator, "LowLatency"),
        options(opts),
        engine(communicator->cuda_device() >= 0 ? ep::make_cuda_engine(object, options)
                                                : ep::make_cpu_engine(object, options)),
        lanes(static_cast<std::size_t>(options.lanes)) {}

  std::int64_t ranks() const { return object.communicator()->size(); }
  Lane& lane_of(const ep::HandleState& handle) {
    return lanes[static_cast<std::size_t>(handle.lane)];
  }
  Allocator allocator_of(const Allocator& given) const {
    return given ? given : engine->default_allocator();
  }

  Outputs make_outputs(const Outputs& given, const MoeShape& shape, const ep::RowFormat& format,
                       ep::OutputMaker& maker) const;
  void check_combine(const CombineRequest& request, const ep::LowLatencyHandle& handle) const;
};

LowLatency::Outputs LowLatency::Impl::make_outputs(const Outputs& given, const MoeShape& shape,
                                                   const ep::RowFormat& format,
                                                   ep::OutputMaker& maker) const {
  const std::int64_t local = shape.experts / ranks(), rows = ranks() * shape.max_tokens;
  const bool any = given.x.present() || given.tokens_per_expert.present() ||
                   given.ranges.present() || given.source_tokens.present() ||
                   given.scales.present();
  if (!any)
    return {maker.make("x", format.dtype, {local, rows, shape.hidden}),
            maker.make("tokens_per_expert", DType::int32, {local}),
            maker.make("ranges", DType::int32, {local, ranks(), 2}),
            maker.make("source_tokens", DType::int32, {local, rows}),
            format.scales > 0
                ? maker.make("scales", format.scale_dtype(), {local, rows, format.scales})
                : TensorView()};
  ep::check_rows("outputs.x", given.x, format.dtype, {local, rows, shape.hidden});
  ep::check_scales_out(given.scales, format, {local, rows, format.scales});
  ep::check_tensor("outputs.tokens_per_expert", given.tokens_per_expert, DType::int32, {local});
  ep::check_tensor("outputs.ranges", given.ranges, DType::int32, {local, ranks(), 2});
  ep::check_tensor("outputs.source_tokens", given.source_tokens, DType::int32, {local, rows});
  return given;
}

LowLatency::LowLatency(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
LowLatency::~LowLatency() { ep::let_go(std::move(impl_)); }

std::unique_ptr<LowLatency> LowLatency::create(const std::shared_ptr<Communicator>& communicator,
                                               const LowLatencyOptions& options) {
  check_argument(communicator != nullptr, "LowLatency::create: communicator is null");
  check_options(options, communicator->size());
  return std::unique_ptr<LowLatency>(new LowLatency(std::make_unique<Impl>(communicator, options)));
}

std::size_t LowLatency::memory_bytes(const LowLatencyOptions& options, int ranks) {
  check_options(options, ranks);
  return ep::low_latency_slots(options, ranks).bytes * static_cast<std::size_t>(options.lanes);
}

Status LowLatency::status() const {
  Status status = impl_->object.status();
  impl_->engine->refresh(status);
  return status;
}

LowLatency::DispatchResult LowLatency::dispatch(const DispatchRequest& request) {
  Impl& self = *impl_;
  self.object.check_usable();
  ep::Geometry geometry(self.options.shape, static_cast<int>(self.ranks()));
  const MoeShape& shape = geometry.call;
  const ep::RowFormat format =
      ep::check_rows_in(geometry, {request.x, request.x_scales, request.cast_to_fp8});
  ep::check_experts(geometry, request.experts);
  ep::check_max_tokens(geometry, request.max_tokens);
  ep::check_routing(geometry, request.x.size(0), request.topk_idx, request.topk_weights);
  ep::check_stream(*self.object.communicator(), request.stream);
  self.engine->check_sms(request.sms);
  const int number = static_cast<int>(self.dispatches % self.lanes.size());
  Calls& calls = self.lanes[static_cast<std::size_t>(number)].dispatch;
  calls.check_send("dispatch");
  if (!request.send_only) calls.check_receive("dispatch", calls.sent);
  ep::OutputMaker maker(self.allocator_of(request.allocator));
  DispatchResult result;
  result.outputs = self.make_outputs(request.outputs, shape, format, maker);
  result.owner = maker.owner();
  const Outputs& out = result.outputs;
  ep::check_memory(*self.object.communicator(),
                   {{"outputs.x", out.x},
                    {"outputs.tokens_per_expert", out.tokens_per_expert},
                    {"outputs.ranges", out.ranges},
                    {"outputs.source_tokens", out.source_tokens},
                    {"outputs.scales", out.scales}},
                   {{"x", request.x},
                    {"x_scales", request.x_scales},
                    {"topk_idx", request.topk_idx},
                    {"topk_weights", request.topk_weights}});

  auto handle = self.engine->make_handle(number, request);
  handle->object = self.object.id();
  handle->lane = number;
  handle->tokens = static_cast<int>(request.x.size(0));
  handle->shape = shape;
  handle->weighted = request.topk_weights.present();
  const ep::LowLatencyDispatch work{request, format, result.outputs, handle, result.owner};
  ++self.dispatches;
  const std::uint64_t called = calls.count(request.send_only);
  if (request.send_only) handle->open_dispatch = ep::OpenHalf<ep::LowLatencyDispatch>(called, work);
  self.engine->dispatch(work, request.send_only ? ep::Half::send : ep::Half::both);
  result.handle = ep::HandleAccess::make(handle);
  return result;
}

void LowLatency::Impl::check_combine(const CombineRequest& request,
                                     const ep::LowLatencyHandle& handle) const {
  const MoeShape& shape = handle.shape;
  check(!handle.open_dispatch, ErrorCode::invalid_usage,
        "the handle's dispatch has sent only; call receive() before combine");
  const DType dtype =
      ep::check_rows_home(options.shape, request.y,
                          {shape.experts / ranks(), ranks() * shape.max_tokens, shape.hidden});
  if (request.topk_weights.present()) {
    ep::check_tensor("topk_weights", request.topk_weights, DType::fp32,
                     {handle.tokens, shape.top_k});
    check(!handle.weighted, ErrorCode::invalid_usage,
          "topk_weights are given to combine, but dispatch had them already; give them once");
  }
  if (request.bias.present())
    ep::check_rows("bias", request.bias, dtype, {handle.tokens, shape.hidden});
  if (request.out.present())
    ep::check_rows("out", request.out, dtype, {handle.tokens, shape.hidden});
}

LowLatency::CombineResult LowLatency::combine(const CombineRequest& request) {
  Impl& self = *impl_;
  self.object.check_usable();
  auto handle = self.object.own_handle<ep::LowLatencyHandle>(request.handle);
  self.check_combine(request, *handle);
  ep::check_stream(*self.object.communicator(), request.stream);
  self.engine->check_sms(request.sms);
  Calls& calls = self.lane_of(*handle).combine;
  calls.check_send("combine");
  if (!request.send_only) calls.check_receive("combine", calls.sent);
  ep::OutputMaker maker(self.allocator_of(request.allocator));
  CombineResult result;
  result.out = request.out.present()
                   ? request.out
                   : maker.make("out", request.y.dtype(), {handle->tokens, handle->shape.hidden});
  result.owner = maker.owner();
  // A sum may take the place of its initial value.
  const bool over_bias = result.out.data() == request.bias.data();
  ep::check_memory(*self.object.communicator(), {{"out", result.out}},
                   {{"y", request.y},
                    {"topk_weights", request.topk_weights},
                    {"bias", over_bias ? ConstTensorView() : request.bias}});

  ep::LowLatencyCombine work{request, result.out, handle, result.owner};
  work.request.handle = {};  // an open half lies in it
  const std::uint64_t called = calls.count(request.send_only);
  if (request.send_only) handle->open_combines.emplace_back(called, work);
  self.engine->combine(work, request.send_only ? ep::Half::send : ep::Half::both);
  return result;
}

void LowLatency::receive(const Handle& handle, const Stream& stream) {
  Impl& self = *impl_;
  self.object.check_usable();
  auto state = self.object.own_handle<ep::LowLatencyHandle>(handle);
  ep::check_stream(*self.object.communicator(), stream);
  Impl::Lane& lane = self.lane_of(*state);
  auto half = [&](const char* operation, Calls& calls, const auto& open) {
    calls.check_receive(operation, open.number);
    auto work = open.operation;
    work.handle = state;
    work.request.stream = stream;
    return work;
  };
  if (state->open_dispatch) {
    const auto work = half("dispatch", lane.dispatch, *state->open_dispatch);
    state->open_dispatch.reset();
    ++lane.dispatch.received;
    return self.engine->dispatch(work, ep::Half::receive);
  }
  check(!state->open_combines.empty(), ErrorCode::invalid_usage,
        "receive: no half of this handle is open; its dispatch and combines have received");
  const auto work = half("combine", lane.combine, state->open_combines.front());
  state->open_combines.pop_front();
  ++lane.combine.received;
  self.engine->combine(work, ep::Half::receive);
}

}  // namespace expertwire
