#include "expertwire/low_latency.hpp"

#include "base/check.hpp"
#include "base/env.hpp"
#include "ep/cpu/low_latency.hpp"
#include "ep/object.hpp"
#include "ep/validate.hpp"

namespace expertwire {

namespace {

using ep::cpu::LowLatencyHandle;
using ep::cpu::LowLatencyLane;

ep::LowLatencySlots slots_of(const LowLatencyOptions& options, int ranks) {
  ep::SlotSizes sizes;
  sizes.ranks = static_cast<std::uint64_t>(ranks);
  sizes.local_experts = static_cast<std::uint64_t>(options.shape.experts / ranks);
  sizes.max_tokens = static_cast<std::uint64_t>(options.shape.max_tokens);
  sizes.top_k = static_cast<std::uint64_t>(options.shape.top_k);
  sizes.row_bytes = options.shape.row_bytes();
  return ep::LowLatencySlots::place(sizes);
}

void check_options(const LowLatencyOptions& options, int ranks) {
  ep::check_shape(options.shape, ranks);
  ep::check_lanes(options.lanes);
}

}  // namespace

struct LowLatency::Impl {
  ep::Object object;
  LowLatencyOptions options;
  std::shared_ptr<ep::Region> region;
  std::vector<std::unique_ptr<LowLatencyLane>> lanes;
  std::uint64_t dispatches = 0;

  Impl(const std::shared_ptr<Communicator>& communicator, const LowLatencyOptions& opts)
      : object(communicator, "LowLatency"), options(opts) {
    const MoeShape& shape = options.shape;
    const ep::LowLatencySlots slots = slots_of(options, communicator->size());
    const int workers = ep::team_size(*communicator, options.threads);
    const ep::Agreement agreement{0,
                                  shape.hidden,
                                  shape.experts,
                                  shape.top_k,
                                  shape.max_tokens,
                                  static_cast<std::int32_t>(shape.dtype),
                                  options.lanes,
                                  Env::get().first_epoch,
                                  0};
    region = std::make_shared<ep::Region>(
        communicator, ep::Region::Request{agreement, slots.bytes, slots.flag_bytes()});
    for (int l = 0; l < options.lanes; ++l)
      lanes.push_back(std::make_unique<LowLatencyLane>(LowLatencyLane::Memory(region, slots, l),
                                                       shape, workers));
  }

  std::int64_t ranks() const { return object.communicator()->size(); }
  std::int64_t local_experts() const { return options.shape.experts / ranks(); }
  std::int64_t rows_per_expert() const { return ranks() * options.shape.max_tokens; }

  Outputs make_outputs(const Outputs& given, ep::OutputMaker& maker) const;
};

LowLatency::Outputs LowLatency::Impl::make_outputs(const Outputs& given,
                                                   ep::OutputMaker& maker) const {
  const std::int64_t local = local_experts(), rows = rows_per_expert();
  const bool any = given.x.present() || given.tokens_per_expert.present() ||
                   given.ranges.present() || given.source_tokens.present();
  if (!any)
    return {maker.make("x", options.shape.dtype, {local, rows, options.shape.hidden}),
            maker.make("tokens_per_expert", DType::int32, {local}),
            maker.make("ranges", DType::int32, {local, ranks(), 2}),
            maker.make("source_tokens", DType::int32, {local, rows})};
  ep::check_rows("outputs.x", given.x, options.shape.dtype, {local, rows, options.shape.hidden});
  ep::check_tensor("outputs.tokens_per_expert", given.tokens_per_expert, DType::int32, {local});
  ep::check_tensor("outputs.ranges", given.ranges, DType::int32, {local, ranks(), 2});
  ep::check_tensor("outputs.source_tokens", given.source_tokens, DType::int32, {local, rows});
  return given;
}

LowLatency::LowLatency(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
LowLatency::~LowLatency() {
  for (const auto& lane : impl_->lanes) lane->turnstile().drain();
}

std::unique_ptr<LowLatency> LowLatency::create(const std::shared_ptr<Communicator>& communicator,
                                               const LowLatencyOptions& options) {
  check_argument(communicator != nullptr, "LowLatency::create: communicator is null");
  check_options(options, communicator->size());
  return std::unique_ptr<LowLatency>(new LowLatency(std::make_unique<Impl>(communicator, options)));
}

std::size_t LowLatency::memory_bytes(const LowLatencyOptions& options, int ranks) {
  check_options(options, ranks);
  return slots_of(options, ranks).bytes * static_cast<std::size_t>(options.lanes);
}

Status LowLatency::status() const { return impl_->object.status(); }

LowLatency::DispatchResult LowLatency::dispatch(const DispatchRequest& request) {
  Impl& self = *impl_;
  self.object.check_usable();
  ep::check_dispatch_inputs(self.options.shape, request.x, request.topk_idx, request.topk_weights);
  ep::OutputMaker maker(request.allocator);
  DispatchResult result;
  result.outputs = self.make_outputs(request.outputs, maker);
  result.owner = maker.owner();

  auto handle = std::make_shared<LowLatencyHandle>();
  handle->object = self.object.id();
  handle->lane = static_cast<int>(self.dispatches++ % self.lanes.size());
  handle->tokens = static_cast<int>(request.x.size(0));
  handle->weighted = request.topk_weights.present();
  result.handle = Handle(handle);
  LowLatencyLane& lane = *self.lanes[static_cast<std::size_t>(handle->lane)];
  const LowLatencyLane::Dispatch op{request.x, request.topk_weights, result.outputs, handle.get()};
  const ep::ExpertIds ids{request.topk_idx.data(), request.topk_idx.dtype() == DType::int64};
  self.object.execute(
      request.stream, lane.turnstile(),
      [&self, &lane, op, ids, handle, owner = result.owner, timeout = request.timeout] {
        handle->route =
            ep::make_route(ids, handle->tokens, self.options.shape.top_k,
                           {static_cast<std::int32_t>(self.ranks()), self.options.shape.experts});
        self.object.note_invalid_ids(handle->route, ids);
        const auto context = self.object.wait_context(timeout, "low-latency dispatch");
        lane.send_dispatch(op, context);
        lane.receive_dispatch(op, context);
        self.object.note_dropped_rows(handle->dropped_rows);
      });
  return result;
}

LowLatency::CombineResult LowLatency::combine(const CombineRequest& request) {
  Impl& self = *impl_;
  self.object.check_usable();
  const MoeShape& shape = self.options.shape;
  auto handle = self.object.own_handle<LowLatencyHandle>(request.handle.state());
  ep::check_rows("y", request.y, shape.dtype,
                 {self.local_experts(), self.rows_per_expert(), shape.hidden});
  const std::int64_t tokens = handle->tokens;
  if (request.topk_weights.present()) {
    ep::check_tensor("topk_weights", request.topk_weights, DType::fp32, {tokens, shape.top_k});
    check(!handle->weighted, ErrorCode::invalid_usage,
          "topk_weights are given to combine, but dispatch had them already; give them once");
  }
  if (request.bias.present())
    ep::check_rows("bias", request.bias, shape.dtype, {tokens, shape.hidden});
  ep::OutputMaker maker(request.allocator);
  CombineResult result;
  if (request.out.present())
    ep::check_rows("out", request.out, shape.dtype, {tokens, shape.hidden});
  result.out =
      request.out.present() ? request.out : maker.make("out", shape.dtype, {tokens, shape.hidden});
  result.owner = maker.owner();

  LowLatencyLane& lane = *self.lanes[static_cast<std::size_t>(handle->lane)];
  const LowLatencyLane::Combine op{request.y, request.topk_weights, request.bias, result.out,
                                   handle.get()};
  self.object.execute(request.stream, lane.turnstile(),
                      [&self, &lane, op, handle, owner = result.owner, timeout = request.timeout] {
                        const auto context =
                            self.object.wait_context(timeout, "low-latency combine");
                        lane.send_combine(op, context);
                        lane.receive_combine(op, context);
                      });
  return result;
}

}  // namespace expertwire
