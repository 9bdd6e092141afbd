#include <array>

#include "bench.hpp"
#include "ep/front/object.hpp"
#include "ep/protocol/row_format.hpp"
#include "expertwire/low_latency.hpp"
#include "limits.hpp"

namespace expertwire::tools {

namespace {

using reference::RankInput;
using Weights = reference::RoundTripOptions::Weights;

/// One set of outputs, given to every call that uses it, as an engine would.
struct Buffers {
  ep::OutputMaker maker{ep::host_allocator()};
  LowLatency::Outputs outputs;
  TensorView y, out;

  Buffers(const MoeShape& shape, int ranks, bool fp8) {
    const std::int64_t local = shape.experts / ranks;
    const std::int64_t rows = static_cast<std::int64_t>(ranks) * shape.max_tokens;
    y = maker.make("x", shape.dtype, {local, rows, shape.hidden});
    outputs = {y, maker.make("tokens_per_expert", DType::int32, {local}),
               maker.make("ranges", DType::int32, {local, ranks, 2}),
               maker.make("source_tokens", DType::int32, {local, rows})};
    if (fp8) {
      outputs.x = maker.make("x", DType::fp8_e4m3, {local, rows, shape.hidden});
      outputs.scales =
          maker.make("scales", DType::fp32, {local, rows, ep::scales_of(shape.hidden)});
    }
    out = maker.make("out", shape.dtype, {shape.max_tokens, shape.hidden});
  }
};

}  // namespace

Measurement bench_low_latency(const std::shared_ptr<Communicator>& communicator,
                              const BenchOptions& options) {
  const MoeShape& shape = options.shape;
  const int rank = communicator->rank(), ranks = communicator->size();
  const reference::Workload workload(
      {shape, ranks, options.seed, reference::RoutingPattern::parse(options.routing)});
  const Steps steps = make_steps(workload, rank);
  LowLatencyOptions object_options{shape, options.lanes, options.threads};
  auto object = LowLatency::create(communicator, object_options);
  Measurement result = start_measurement(*communicator, steps, options);
  result.arena_bytes = LowLatency::memory_bytes(object_options, ranks);

  for (int step = 0; options.verify && step < 2; ++step)
    result.report += round_trip(*object, *communicator, workload, step, check_of(options));

  std::array<Buffers, 2> buffers{Buffers(shape, ranks, options.fp8),
                                 Buffers(shape, ranks, options.fp8)};
  result.memcpy_us = measure_memcpy(*communicator, result.unique_bytes, result.threads);
  const auto run = [&](int i, double late_us, Timings& timings) {
    const auto at = static_cast<std::size_t>(i);
    const RankInput& input = steps.inputs[at % steps.inputs.size()];
    Buffers& buffer = buffers[at % buffers.size()];
    const std::int64_t tokens = input.tokens;
    LowLatency::DispatchRequest dispatch;
    dispatch.x = {input.x.data(), shape.dtype, {tokens, shape.hidden}};
    dispatch.topk_idx = {input.topk_idx.data(), DType::int64, {tokens, shape.top_k}};
    const ConstTensorView weights{input.topk_weights.data(), DType::fp32, {tokens, shape.top_k}};
    if (options.weights == Weights::dispatch) dispatch.topk_weights = weights;
    dispatch.outputs = buffer.outputs;
    dispatch.cast_to_fp8 = options.fp8;
    hold_up(late_us);
    const double start = now_us();
    const auto dispatched = object->dispatch(dispatch);
    const double middle = now_us();
    hold_up(late_us);
    const double again = now_us();
    LowLatency::CombineRequest combine;
    combine.y = buffer.y;
    combine.handle = dispatched.handle;
    if (options.weights == Weights::combine) combine.topk_weights = weights;
    combine.out = buffer.out;
    object->combine(combine);
    const double end = now_us();
    timings.dispatch.push_back(middle - start);
    timings.combine.push_back(end - again);
  };
  time_on_host(*communicator, options, run, result);
  // Before and after, because a machine's bandwidth drifts.
  const double after = measure_memcpy(*communicator, result.unique_bytes, result.threads);
  result.memcpy_us = (result.memcpy_us + after) / 2;
  return result;
}

}  // namespace expertwire::tools
