#include "reference/round_trip.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>

#include "reference/trip.hpp"

namespace expertwire::reference {

TripInput::TripInput(Tensors& tensors, const Workload& workload, int rank, int step,
                     const RoundTripOptions& options)
    : input(workload.input(rank, step)) {
  const MoeShape& shape = workload.spec().shape;
  const std::int64_t tokens = input.tokens;
  auto upload = [&](const void* data, DType dtype, std::int64_t columns) {
    return tensors.upload({data, dtype, {tokens, columns}});
  };
  x = upload(input.x.data(), shape.dtype, shape.hidden);
  if (options.payload == RoundTripOptions::Payload::fp8) {
    Fp8Row all;
    for (int t = 0; t < input.tokens; ++t) {
      const std::byte* row = input.x.data() + at(t) * shape.row_bytes();
      const Fp8Row one = to_fp8(decode(shape.dtype, row, at(shape.hidden)));
      all.data.insert(all.data.end(), one.data.begin(), one.data.end());
      all.scales.insert(all.scales.end(), one.scales.begin(), one.scales.end());
    }
    x = upload(all.data.data(), DType::fp8_e4m3, shape.hidden);
    x_scales = upload(all.scales.data(), DType::fp32, (shape.hidden + 127) / 128);
  }
  topk_weights = upload(input.topk_weights.data(), DType::fp32, shape.top_k);
  bias = upload(input.bias.data(), shape.dtype, shape.hidden);
  const std::vector<std::int32_t> narrow(input.topk_idx.begin(), input.topk_idx.end());
  topk_idx = options.wide_ids ? upload(input.topk_idx.data(), DType::int64, shape.top_k)
                              : upload(narrow.data(), DType::int32, shape.top_k);
}

bool is_fp8(const RoundTripOptions& options) {
  return options.payload != RoundTripOptions::Payload::plain;
}

/// One received row against the token's own, or against its fp8 form.
void check_dispatched(Checker& check, const Oracle& oracle, int source, int token,
                      const TensorView& x, const TensorView& scales, std::int64_t row) {
  const auto hidden = at(x.size(x.dimensions() - 1));
  const std::byte* got = x.as<std::byte>() + at(row) * hidden * size_of(x.dtype());
  const Row sent = oracle.row_of(source, token, false);
  if (!scales.present()) {
    std::vector<std::byte> want(hidden * size_of(x.dtype()));
    encode(x.dtype(), sent, want.data());
    check.same_row("dispatched", row, x.dtype(), got, want.data(), hidden);
    return;
  }
  const Fp8Row want = to_fp8(sent);
  check.same_row("dispatched", row, x.dtype(), got, want.data.data(), hidden);
  const std::size_t per_row = want.scales.size();
  for (std::size_t i = 0; i < per_row; ++i)
    check.same("scales", row, static_cast<std::int64_t>(i),
               scales.as<float>()[at(row) * per_row + i], want.scales[i]);
}

void check_combined(Checker& check, const Oracle& oracle, const Workload& workload, int rank,
                    const Home& home) {
  const MoeShape& shape = workload.spec().shape;
  std::vector<std::byte> want(shape.row_bytes());
  for (int t = 0; t < oracle.tokens(rank); ++t) {
    encode(shape.dtype,
           oracle.combined(rank, t, home.weights, home.bias, home.layout, home.capacities),
           want.data());
    check.same_row("combined", t, shape.dtype, home.out.as<std::byte>() + at(t) * shape.row_bytes(),
                   want.data(), at(shape.hidden));
  }
}

Report& Report::operator+=(const Report& other) {
  if (wrong == 0) first_wrong = other.first_wrong;
  checked += other.checked;
  wrong += other.wrong;
  return *this;
}

Row values_of(const TensorView& x, const TensorView& scales, std::int64_t row) {
  const auto hidden = at(x.size(x.dimensions() - 1));
  Row values = decode(x.dtype(), x.as<std::byte>() + at(row) * hidden * size_of(x.dtype()), hidden);
  if (!scales.present()) return values;
  const std::size_t per_row = (hidden + 127) / 128;
  for (std::size_t h = 0; h < hidden; ++h)
    values[h] *= scales.as<float>()[at(row) * per_row + h / 128];
  return values;
}

// Low latency ----------------------------------------------------------------------------------

void run_experts(const ExpertPass& pass, const LowLatency::Outputs& outputs, std::byte* y) {
  const MoeShape& shape = pass.workload->spec().shape;
  const int local = static_cast<int>(outputs.x.size(0));
  const std::size_t rows = at(outputs.x.size(1)), bytes = shape.row_bytes();
  for (int e = 0; e < local; ++e)
    // What an operation that failed has left may be anything.
    for (int i = 0; i < std::min(outputs.tokens_per_expert.as<std::int32_t>()[e],
                                 static_cast<std::int32_t>(rows));
         ++i) {
      const std::size_t place = at(e) * rows + at(i);
      const Row x = values_of(outputs.x, outputs.scales, static_cast<std::int64_t>(place));
      encode(shape.dtype, apply_expert(shape.dtype, pass.rank * local + e, x), y + place * bytes);
    }
}

namespace {

void check_expert_major(Checker& check, const Oracle& oracle, int rank, int ranks,
                        const LowLatency::Outputs& outputs) {
  const std::int64_t rows = outputs.x.size(1);
  for (int e = 0; e < outputs.x.size(0); ++e) {
    const auto expected = oracle.expert_major(rank, e);
    check.same("tokens_per_expert", e, 0, outputs.tokens_per_expert.as<std::int32_t>()[e],
               static_cast<std::int32_t>(expected.size()));
    std::vector<std::int32_t> from(at(ranks), 0);
    for (const ReceivedRow& row : expected) ++from[at(row.source)];
    std::int32_t first = 0;
    for (int source = 0; source < ranks; ++source) {
      const auto* range = outputs.ranges.as<std::int32_t>() + (at(e) * at(ranks) + at(source)) * 2;
      check.same("ranges", e, 2 * source, range[0], from[at(source)]);
      check.same("ranges", e, 2 * source + 1, range[1], first);
      first += from[at(source)];
    }
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const std::int64_t place = e * rows + static_cast<std::int64_t>(i);
      check.same("source_tokens", e, static_cast<std::int64_t>(i),
                 outputs.source_tokens.as<std::int32_t>()[place], expected[i].token);
      check_dispatched(check, oracle, expected[i].source, expected[i].token, outputs.x,
                       outputs.scales, place);
    }
  }
}

}  // namespace

Report round_trip(LowLatency& object, const Communicator& communicator, const Workload& workload,
                  int step, const RoundTripOptions& options) {
  const int rank = communicator.rank(), ranks = communicator.size();
  const MoeShape& shape = workload.spec().shape;
  const std::int64_t local = shape.experts / ranks, rows = ranks * shape.max_tokens;
  Tensors tensors(communicator);
  const TripInput call(tensors, workload, rank, step, options);
  Checker check(rank);

  LowLatency::DispatchRequest request;
  request.experts = shape.experts;
  request.max_tokens = shape.max_tokens;
  request.x = call.x;
  request.x_scales = call.x_scales;
  request.cast_to_fp8 = options.payload == RoundTripOptions::Payload::cast;
  const bool fp8 = is_fp8(options);
  const DType dtype = fp8 ? DType::fp8_e4m3 : shape.dtype;
  request.topk_idx = call.topk_idx;
  if (options.weights == RoundTripOptions::Weights::dispatch)
    request.topk_weights = call.topk_weights;
  if (options.preallocated)
    request.outputs = {
        tensors.make(dtype, {local, rows, shape.hidden}), tensors.make(DType::int32, {local}),
        tensors.make(DType::int32, {local, ranks, 2}), tensors.make(DType::int32, {local, rows}),
        fp8 ? tensors.make(DType::fp32, {local, rows, (shape.hidden + 127) / 128}) : TensorView()};
  else
    request.allocator = tensors.allocator();
  request.send_only = options.split;
  const auto dispatched = object.dispatch(request);
  if (options.split) object.receive(dispatched.handle);

  const Oracle oracle(workload, step, fp8);
  const LowLatency::Outputs seen{tensors.download(dispatched.outputs.x),
                                 tensors.download(dispatched.outputs.tokens_per_expert),
                                 tensors.download(dispatched.outputs.ranges),
                                 tensors.download(dispatched.outputs.source_tokens),
                                 tensors.download(dispatched.outputs.scales)};
  check_expert_major(check, oracle, rank, ranks, seen);

  LowLatency::CombineRequest back;
  const TensorView y = tensors.make(shape.dtype, {local, rows, shape.hidden});
  const TensorView made = tensors.download(y);
  run_experts({&workload, rank}, seen, made.as<std::byte>());
  tensors.write_back(y, made);
  back.y = y;
  back.handle = dispatched.handle;
  if (options.weights == RoundTripOptions::Weights::combine) back.topk_weights = call.topk_weights;
  if (options.bias) back.bias = call.bias;
  if (options.preallocated)
    back.out = tensors.make(shape.dtype, {call.input.tokens, shape.hidden});
  else
    back.allocator = tensors.allocator();
  back.send_only = options.split;
  const auto combined = object.combine(back);
  if (options.split) object.receive(dispatched.handle);
  const bool plain = options.weights == RoundTripOptions::Weights::none;
  check_combined(
      check, oracle, workload, rank,
      {tensors.download(combined.out), plain ? Oracle::Weights::none : Oracle::Weights::given,
       options.bias, Oracle::Layout::expert_major, nullptr});
  return check.report();
}

// High throughput ------------------------------------------------------------------------------

void run_experts(const ExpertPass& pass, const HighThroughput::Outputs& outputs, std::int64_t rows,
                 bool weighted, std::byte* y) {
  const WorkloadSpec& spec = pass.workload->spec();
  const MoeShape& shape = spec.shape;
  const int local = shape.experts / spec.ranks;
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::size_t offset = at(row) * shape.row_bytes();
    const Row x = values_of(outputs.x, outputs.scales, row);
    Row acc(x.size(), 0.0F);
    for (int k = 0; k < shape.top_k; ++k) {
      const std::size_t i = at(row) * at(shape.top_k) + at(k);
      const std::int32_t expert = outputs.topk_experts.as<std::int32_t>()[i];
      if (expert < 0) continue;
      const Row out = apply_expert(shape.dtype, pass.rank * local + expert, x);
      const float w = weighted ? outputs.topk_weights.as<float>()[i] : 1.0F;
      for (std::size_t h = 0; h < acc.size(); ++h) acc[h] = std::fma(w, out[h], acc[h]);
    }
    encode(shape.dtype, acc, y + offset);
  }
}

namespace {

void check_token_major(Checker& check, const Oracle& oracle, int rank,
                       const HighThroughput::Outputs& outputs, bool weighted) {
  const auto expected = oracle.token_major(rank);
  const int top_k = static_cast<int>(outputs.topk_experts.size(1));
  const std::int64_t rows = std::min(outputs.x.size(0), static_cast<std::int64_t>(expected.size()));
  for (std::int64_t row = 0; row < rows; ++row) {
    const ReceivedRow& wanted = expected[at(row)];
    check.same("source_tokens", row, 0, outputs.source_tokens.as<std::int32_t>()[row],
               wanted.token);
    for (int k = 0; k < top_k; ++k) {
      const std::size_t i = at(row) * at(top_k) + at(k);
      check.same("topk_experts", row, k, outputs.topk_experts.as<std::int32_t>()[i],
                 wanted.experts[at(k)]);
      check.same("topk_weights", row, k, outputs.topk_weights.as<float>()[i],
                 weighted ? wanted.weights[at(k)] : 0.0F);
    }
    check_dispatched(check, oracle, wanted.source, wanted.token, outputs.x, outputs.scales, row);
  }
}

/// What the host has been told of a dispatch without a stream.
void check_counts(Checker& check, const Oracle& oracle, int rank, int ranks,
                  const HighThroughput::DispatchResult& dispatched) {
  std::vector<std::int32_t> sources(at(ranks)), experts(dispatched.rows_per_expert.size());
  for (const ReceivedRow& row : oracle.token_major(rank)) {
    ++sources[at(row.source)];
    for (std::int32_t expert : row.experts)
      if (expert >= 0 && at(expert) < experts.size()) ++experts[at(expert)];
  }
  check.same("rows_per_source", 0, 0, static_cast<int>(dispatched.rows_per_source.size()), ranks);
  for (std::size_t i = 0; i < dispatched.rows_per_source.size() && i < sources.size(); ++i)
    check.same("rows_per_source", static_cast<int>(i), 0, dispatched.rows_per_source[i],
               sources[i]);
  check.same("rows_per_expert", 0, 0, experts.empty() ? 0 : 1, 1);
  for (std::size_t i = 0; i < experts.size(); ++i)
    check.same("rows_per_expert", static_cast<int>(i), 0, dispatched.rows_per_expert[i],
               experts[i]);
}

}  // namespace

void check_sources(Checker& check, const Oracle& oracle, int rank, const TensorView& offsets) {
  std::vector<std::int32_t> before(at(offsets.size(0)), 0);
  for (const ReceivedRow& row : oracle.token_major(rank))
    for (std::size_t i = at(row.source) + 1; i < before.size(); ++i) ++before[i];
  for (std::size_t i = 0; i < before.size(); ++i)
    check.same("source_offsets", static_cast<std::int64_t>(i), 0, offsets.as<std::int32_t>()[i],
               before[i]);
}

namespace {

/// (rank, token) of the rows of `source` that had room there.
std::set<std::pair<std::int64_t, int>> kept_tokens(const Oracle& oracle, int source, int ranks,
                                                   const Capacities& capacities) {
  std::set<std::pair<std::int64_t, int>> kept;
  for (int r = 0; r < ranks; ++r) {
    const auto rows = oracle.token_major(r);
    for (std::size_t i = 0; i < rows.size() && i < at(capacities.rows[at(r)]); ++i)
      if (rows[i].source == source) kept.emplace(r, rows[i].token);
  }
  return kept;
}

}  // namespace

Report round_trip(HighThroughput& object, const Communicator& communicator,
                  const Workload& workload, int step, const RoundTripOptions& options) {
  if (options.layout == HighThroughput::Layout::expert_major)
    return grouped_trip(object, communicator, workload, step, options);
  const int rank = communicator.rank(), ranks = communicator.size();
  const MoeShape& shape = workload.spec().shape;
  const bool weighted = options.weights == RoundTripOptions::Weights::dispatch;
  Tensors tensors(communicator);
  const TripInput call(tensors, workload, rank, step, options);
  const bool fp8 = is_fp8(options);
  const DType dtype = fp8 ? DType::fp8_e4m3 : shape.dtype;
  const Oracle oracle(workload, step, fp8);
  Checker check(rank);

  Capacities capacities;
  for (int r = 0; r < ranks; ++r) {
    const auto needed = static_cast<double>(oracle.token_major(r).size());
    capacities.rows.push_back(options.capacity > 0
                                  ? static_cast<std::int64_t>(needed * options.capacity)
                                  : static_cast<std::int64_t>(needed));
  }
  const auto rows_due = static_cast<std::int64_t>(oracle.token_major(rank).size());

  HighThroughput::DispatchRequest request;
  request.experts = shape.experts;
  request.x = call.x;
  request.x_scales = call.x_scales;
  request.topk_idx = call.topk_idx;
  if (weighted) request.topk_weights = call.topk_weights;
  request.output = options.output;
  if (options.capacity > 0) request.capacity = capacities.rows[at(rank)];
  if (options.preallocated && request.capacity && options.output == HighThroughput::Output::owned) {
    const std::int64_t n = *request.capacity;
    request.outputs = {
        tensors.make(dtype, {n, shape.hidden}), tensors.make(DType::int32, {n}),
        tensors.make(DType::int32, {n, shape.top_k}), tensors.make(DType::fp32, {n, shape.top_k}),
        fp8 ? tensors.make(DType::fp32, {n, (shape.hidden + 127) / 128}) : TensorView()};
  } else {
    request.allocator = tensors.allocator();
  }
  auto dispatched = object.dispatch(request);
  auto see = [&] {
    const HighThroughput::Outputs& o = dispatched.outputs;
    return HighThroughput::Outputs{tensors.download(o.x), tensors.download(o.source_tokens),
                                   tensors.download(o.topk_experts),
                                   tensors.download(o.topk_weights), tensors.download(o.scales)};
  };
  HighThroughput::Outputs seen = see();
  check.same("needed_rows", 0, 0, *tensors.download(dispatched.needed_rows).as<std::int32_t>(),
             static_cast<std::int32_t>(rows_due));
  check.same("rows", 0, 0, dispatched.outputs.x.size(0), capacities.rows[at(rank)]);
  check_token_major(check, oracle, rank, seen, weighted);
  check_counts(check, oracle, rank, ranks, dispatched);
  check_sources(check, oracle, rank, tensors.download(dispatched.source_offsets));
  if (options.cached) {
    object.release(dispatched.handle);
    request.topk_idx = {};
    request.capacity.reset();
    request.outputs = {};
    request.allocator = tensors.allocator();
    request.cached = dispatched.handle;
    dispatched = object.dispatch(request);
    seen = see();
    check_token_major(check, oracle, rank, seen, weighted);
    check_counts(check, oracle, rank, ranks, dispatched);
  }

  const std::int64_t n = dispatched.outputs.x.size(0);
  const std::int64_t filled = std::min(n, rows_due);
  const bool in_place = options.in_place && options.output == HighThroughput::Output::pool;
  const TensorView y = in_place
                           ? TensorView(dispatched.outputs.x.data(), shape.dtype, {n, shape.hidden})
                           : tensors.make(shape.dtype, {n, shape.hidden});
  const TensorView made = tensors.download(y);
  run_experts({&workload, rank}, seen, filled, weighted, made.as<std::byte>());
  tensors.write_back(y, made);

  HighThroughput::CombineRequest back;
  back.y = y;
  back.handle = dispatched.handle;
  if (options.weights_home) back.topk_weights = dispatched.outputs.topk_weights;
  if (options.bias) back.bias = call.bias;
  back.allocator = tensors.allocator();
  const auto combined = object.combine(back);
  check_combined(
      check, oracle, workload, rank,
      {tensors.download(combined.out), weighted ? Oracle::Weights::given : Oracle::Weights::none,
       options.bias, Oracle::Layout::token_major, &capacities});
  if (!options.weights_home) return check.report();
  const TensorView home = tensors.download(combined.topk_weights);
  const auto kept = kept_tokens(oracle, rank, ranks, capacities);
  for (int t = 0; t < call.input.tokens; ++t)
    for (int k = 0; k < shape.top_k; ++k) {
      const std::size_t i = at(t) * at(shape.top_k) + at(k);
      const std::int64_t id = call.input.topk_idx[i];
      const bool came = id >= 0 && kept.contains({id / (shape.experts / ranks), t});
      check.same("weights home", t, k, home.as<float>()[i],
                 weighted && came ? call.input.topk_weights[i] : 0.0F);
    }
  return check.report();
}

}  // namespace expertwire::reference
