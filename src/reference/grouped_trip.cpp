#include <algorithm>

#include "reference/trip.hpp"

namespace expertwire::reference {

void run_grouped_experts(const ExpertPass& pass, const HighThroughput::Outputs& outputs,
                         std::byte* y) {
  const WorkloadSpec& spec = pass.workload->spec();
  const int local = spec.shape.experts / spec.ranks;
  for (std::int64_t row = 0; row < outputs.x.size(0); ++row) {
    const std::int32_t expert = outputs.topk_experts.as<std::int32_t>()[row];
    if (expert < 0) continue;
    const Row x = values_of(outputs.x, outputs.scales, row);
    encode(spec.shape.dtype, apply_expert(spec.shape.dtype, pass.rank * local + expert, x),
           y + at(row) * spec.shape.row_bytes());
  }
}

namespace {

using Outputs = HighThroughput::Outputs;

/// All zeros: a row that pads a group.
void check_zeros(Checker& check, const Outputs& seen, std::int64_t row) {
  const std::size_t bytes = at(seen.x.size(1)) * size_of(seen.x.dtype());
  const auto* x = seen.x.as<std::byte>() + at(row) * bytes;
  const bool zeros = std::all_of(x, x + bytes, [](std::byte b) { return b == std::byte{0}; });
  check.same("zeros that pad", row, 0, zeros, true);
}

void check_grouped(Checker& check, const Oracle& oracle, const std::vector<ReceivedRow>& wanted,
                   const Outputs& seen, bool weighted) {
  const std::int64_t rows = seen.x.size(0);
  for (std::int64_t row = 0; row < rows; ++row) {
    const bool behind = row >= static_cast<std::int64_t>(wanted.size());
    const ReceivedRow want = behind ? ReceivedRow{-1, -1, {-1}, {0.0F}} : wanted[at(row)];
    check.same("source_tokens", row, 0, seen.source_tokens.as<std::int32_t>()[row], want.token);
    check.same("topk_experts", row, 0, seen.topk_experts.as<std::int32_t>()[row], want.experts[0]);
    check.same("topk_weights", row, 0, seen.topk_weights.as<float>()[row],
               weighted ? want.weights[0] : 0.0F);
    if (want.source >= 0)
      check_dispatched(check, oracle, want.source, want.token, seen.x, seen.scales, row);
    else if (seen.scales.present())
      check.same("scales", row, 0, seen.scales.as<float>()[row * seen.scales.size(1)], 0.0F);
    if (want.source < 0 && !behind) check_zeros(check, seen, row);
  }
}

void check_offsets(Checker& check, const std::vector<ReceivedRow>& wanted, int alignment,
                   const TensorView& experts, const TensorView& groups) {
  const std::int64_t local = experts.size(0) - 1;
  std::vector<std::int32_t> counts(at(local), 0);
  for (const ReceivedRow& row : wanted)
    if (row.source >= 0) ++counts[at(row.experts[0])];
  std::int32_t sum = 0, padded = 0;
  for (std::int64_t e = 0; e <= local; ++e) {
    check.same("expert_offsets", e, 0, experts.as<std::int32_t>()[e], sum);
    check.same("group_offsets", e, 0, groups.as<std::int32_t>()[e], padded);
    if (e == local) break;
    sum += counts[at(e)];
    padded += (counts[at(e)] + alignment - 1) / alignment * alignment;
  }
}

Outputs seen_of(Tensors& tensors, const Outputs& o) {
  return {tensors.download(o.x), tensors.download(o.source_tokens),
          tensors.download(o.topk_experts), tensors.download(o.topk_weights),
          tensors.download(o.scales)};
}

}  // namespace

Report grouped_trip(HighThroughput& object, const Communicator& communicator,
                    const Workload& workload, int step, const RoundTripOptions& options) {
  const int rank = communicator.rank(), ranks = communicator.size();
  const MoeShape& shape = workload.spec().shape;
  const bool weighted = options.weights == RoundTripOptions::Weights::dispatch;
  Tensors tensors(communicator);
  const TripInput call(tensors, workload, rank, step, options);
  const bool fp8 = is_fp8(options);
  const Oracle oracle(workload, step, fp8);
  Checker check(rank);

  Capacities capacities;
  capacities.alignment = options.alignment;
  for (int r = 0; r < ranks; ++r) {
    const auto needed = static_cast<double>(oracle.grouped(r, options.alignment).size());
    const std::int64_t most = std::int64_t{ranks} * shape.max_tokens * shape.top_k +
                              std::int64_t{shape.experts / ranks} * (options.alignment - 1);
    capacities.rows.push_back(std::min(
        static_cast<std::int64_t>(options.capacity > 0 ? needed * options.capacity : needed),
        most));
  }
  const auto wanted = oracle.grouped(rank, options.alignment);

  HighThroughput::DispatchRequest request;
  request.experts = shape.experts;
  request.layout = HighThroughput::Layout::expert_major;
  request.expert_alignment = options.alignment;
  request.x = call.x;
  request.x_scales = call.x_scales;
  request.topk_idx = call.topk_idx;
  if (weighted) request.topk_weights = call.topk_weights;
  request.allocator = tensors.allocator();
  if (options.capacity > 0) request.capacity = capacities.rows[at(rank)];
  if (options.capacity > 0 && options.preallocated) {
    const std::int64_t n = *request.capacity;
    request.outputs = {
        tensors.make(fp8 ? DType::fp8_e4m3 : shape.dtype, {n, shape.hidden}),
        tensors.make(DType::int32, {n}), tensors.make(DType::int32, {n}),
        tensors.make(DType::fp32, {n}),
        fp8 ? tensors.make(DType::fp32, {n, (shape.hidden + 127) / 128}) : TensorView()};
  }
  auto dispatched = object.dispatch(request);
  const auto look = [&] {
    const Outputs seen = seen_of(tensors, dispatched.outputs);
    check.same("rows", 0, 0, seen.x.size(0), capacities.rows[at(rank)]);
    check.same("needed_rows", 0, 0, *tensors.download(dispatched.needed_rows).as<std::int32_t>(),
               static_cast<std::int32_t>(wanted.size()));
    check_sources(check, oracle, rank, tensors.download(dispatched.source_offsets));
    check_offsets(check, wanted, options.alignment, tensors.download(dispatched.expert_offsets),
                  tensors.download(dispatched.group_offsets));
    check_grouped(check, oracle, wanted, seen, weighted);
    return seen;
  };
  Outputs seen = look();
  if (options.cached) {
    request.topk_idx = {};
    request.capacity.reset();
    request.outputs = {};
    request.cached = dispatched.handle;
    dispatched = object.dispatch(request);
    seen = look();
  }

  HighThroughput::CombineRequest back;
  const TensorView y = tensors.make(shape.dtype, {seen.x.size(0), shape.hidden});
  const TensorView made = tensors.download(y);
  run_grouped_experts({&workload, rank}, seen, made.as<std::byte>());
  tensors.write_back(y, made);
  back.y = y;
  back.handle = dispatched.handle;
  if (weighted) back.row_weights = dispatched.outputs.topk_weights;
  if (options.weights_home) back.topk_weights = dispatched.outputs.topk_weights;
  if (options.bias) back.bias = call.bias;
  back.allocator = tensors.allocator();
  const auto combined = object.combine(back);
  check_combined(
      check, oracle, workload, rank,
      {tensors.download(combined.out), weighted ? Oracle::Weights::given : Oracle::Weights::none,
       options.bias, Oracle::Layout::grouped, &capacities});
  if (!options.weights_home) return check.report();
  const TensorView home = tensors.download(combined.topk_weights);
  const std::int64_t local = shape.experts / ranks;
  for (std::size_t i = 0; i < call.input.topk_idx.size(); ++i) {
    const std::int64_t id = call.input.topk_idx[i];
    const bool came =
        id >= 0 && oracle.grouped_row(rank, static_cast<std::int64_t>(i), options.alignment) <
                       capacities.rows[at(id / local)];
    check.same("weights home", static_cast<std::int64_t>(i), 0, home.as<float>()[i],
               weighted && came ? call.input.topk_weights[i] : 0.0F);
  }
  return check.report();
}

}  // namespace expertwire::reference
