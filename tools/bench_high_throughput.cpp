#include "bench.hpp"
#include "ep/front/object.hpp"
#include "ep/protocol/row_format.hpp"
#include "expertwire/high_throughput.hpp"
#include "limits.hpp"
#include "mpi_peer.hpp"

namespace expertwire::tools {

namespace {

using reference::RankInput;
using Weights = reference::RoundTripOptions::Weights;

/// Outputs of one size, made once: an engine's allocator hands out memory that was used before.
class ReusingAllocator {
 public:
  explicit ReusingAllocator(std::size_t row_bytes) : row_bytes_(row_bytes) {}
  Allocation operator()(const AllocationRequest& request) {
    const bool rows = request.name == "x";
    Allocation& kept = rows ? rows_ : others_[next_++ % kOthers];
    std::size_t& size = rows ? rows_size_ : others_size_[(next_ - 1) % kOthers];
    const std::size_t bytes = request.like.bytes();
    if (size < bytes) {
      size = bytes + bytes / 4 + row_bytes_;
      kept = allocate_host(size);
    }
    return kept;
  }

 private:
  static constexpr std::size_t kOthers = 4;
  std::size_t row_bytes_;
  Allocation rows_, others_[kOthers];
  std::size_t rows_size_ = 0, others_size_[kOthers] = {};
  std::size_t next_ = 0;
};

}  // namespace

Measurement bench_high_throughput(const std::shared_ptr<Communicator>& communicator,
                                  const BenchOptions& options) {
  const MoeShape& shape = options.shape;
  const int rank = communicator->rank(), ranks = communicator->size();
  const bool pool = options.output == HighThroughput::Output::pool;
  const reference::Workload workload(
      {shape, ranks, options.seed, reference::RoutingPattern::parse(options.routing)});
  const Steps steps = make_steps(workload, rank);
  const HighThroughputOptions object_options = high_throughput_options(options);
  auto object = HighThroughput::create(communicator, object_options);
  Measurement result = start_measurement(*communicator, steps, options);
  result.arena_bytes = HighThroughput::memory_bytes(object_options, ranks);

  if (options.verify)
    result.report += round_trip(*object, *communicator, workload, 0, check_of(options));

  ReusingAllocator allocator(shape.row_bytes());
  const Allocation out =
      allocate_host(static_cast<std::size_t>(shape.max_tokens) * shape.row_bytes());
  // fp8: what the codes are does not matter for time. y is as large as any rank's output can be.
  const std::vector<float> scales(
      options.fp8 ? static_cast<std::size_t>(shape.max_tokens) * ep::scales_of(shape.hidden) : 0);
  const std::int64_t most_rows = options.most_rows(ranks);
  Allocation y;
  if (options.fp8 && !pool)
    y = allocate_host(static_cast<std::size_t>(most_rows) * shape.row_bytes());
  result.memcpy_us = measure_memcpy(*communicator, result.unique_bytes, result.threads);
  const auto run = [&](int i, double late_us, Timings& timings) {
    const RankInput& input = steps.inputs[static_cast<std::size_t>(i) % steps.inputs.size()];
    const std::int64_t tokens = input.tokens;
    HighThroughput::DispatchRequest dispatch;
    dispatch.x = {
        input.x.data(), options.fp8 ? DType::fp8_e4m3 : shape.dtype, {tokens, shape.hidden}};
    if (options.fp8)
      dispatch.x_scales = {scales.data(), DType::fp32, {tokens, ep::scales_of(shape.hidden)}};
    dispatch.topk_idx = {input.topk_idx.data(), DType::int64, {tokens, shape.top_k}};
    if (options.weights == Weights::dispatch)
      dispatch.topk_weights = {input.topk_weights.data(), DType::fp32, {tokens, shape.top_k}};
    dispatch.output = options.output;
    dispatch.layout = options.layout;
    dispatch.expert_alignment = options.alignment;
    dispatch.allocator = Allocator::of(allocator);
    hold_up(late_us);
    const double start = now_us();
    const auto dispatched = object->dispatch(dispatch);
    const double middle = now_us();
    hold_up(late_us);
    const double again = now_us();
    HighThroughput::CombineRequest combine;
    const TensorView& x = dispatched.outputs.x;  // where pool rows are, y may be too
    combine.y = {y.data != nullptr ? y.data : x.data(), shape.dtype, {x.size(0), x.size(1)}};
    combine.handle = dispatched.handle;
    if (options.grouped() && options.weights == Weights::dispatch)
      combine.row_weights = dispatched.outputs.topk_weights;
    combine.out = {out.data, shape.dtype, {tokens, shape.hidden}};
    object->combine(combine);
    const double end = now_us();
    timings.dispatch.push_back(middle - start);
    timings.combine.push_back(end - again);
  };
  time_on_host(*communicator, options, run, result);
  // Before and after, because a machine's bandwidth drifts.
  const double after = measure_memcpy(*communicator, result.unique_bytes, result.threads);
  result.memcpy_us = (result.memcpy_us + after) / 2;
  if (options.peer == "mpi")
    result.peers = {{"mpi", "", bench_mpi(*communicator, steps, options, result.threads)}};
  return result;
}

}  // namespace expertwire::tools
