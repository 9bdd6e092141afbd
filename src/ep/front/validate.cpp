#include "ep/front/validate.hpp"

#include <algorithm>

#include "base/check.hpp"
#include "base/cuda_calls.hpp"
#include "ep/protocol/routing.hpp"

namespace expertwire::inline v0::ep {

namespace {

constexpr std::uintptr_t kRowAlignment = 16;
constexpr int kMostHidden = 1 << 20;
constexpr int kMostExperts = 1 << 20;
constexpr int kMostLanes = 8;

/// The number of ranks next to `ranks` that divides `experts`.
int nearest_divisor(int experts, int ranks) {
  for (int distance = 1; distance < std::max(experts, ranks); ++distance) {
    if (ranks - distance >= 1 && experts % (ranks - distance) == 0) return ranks - distance;
    if (experts % (ranks + distance) == 0) return ranks + distance;
  }
  return 1;
}

void check_alignment(const char* name, const ConstTensorView& tensor, std::uintptr_t alignment) {
  check_argument(reinterpret_cast<std::uintptr_t>(tensor.data()) % alignment == 0,
                 "{} is at address {}; it must be aligned to {} bytes", name,
                 fmt::ptr(tensor.data()), alignment);
}

}  // namespace

void check_expert_count(int experts, int ranks) {
  check_argument(ranks >= 1, "ranks is {}; it must be at least 1", ranks);
  check_argument(experts >= 1 && experts <= kMostExperts, "experts is {}; it must be from 1 to {}",
                 experts, kMostExperts);
  check_argument(experts % ranks == 0,
                 "experts is {} with {} ranks; it must be a multiple of the ranks (the nearest "
                 "number of ranks that divides {} is {})",
                 experts, ranks, experts, nearest_divisor(experts, ranks));
}

void check_shape(const MoeShape& shape, int ranks) {
  check_expert_count(shape.experts, ranks);
  check_argument(
      shape.dtype == DType::bf16 || shape.dtype == DType::fp16 || shape.dtype == DType::fp32,
      "shape.dtype is {}; it must be bf16, fp16 or fp32", to_string(shape.dtype));
  check_argument(
      shape.hidden >= 1 && shape.hidden <= kMostHidden && shape.row_bytes() % kRowAlignment == 0,
      "shape.hidden is {}, {} bytes a row of {}; it must be from 1 to {}, and a row a "
      "multiple of 16 bytes",
      shape.hidden, shape.row_bytes(), to_string(shape.dtype), kMostHidden);
  check_argument(shape.top_k >= 1 && shape.top_k <= kMostTopK,
                 "shape.top_k is {}; it must be from 1 to {}", shape.top_k, kMostTopK);
  check_argument(shape.max_tokens >= 1 && shape.max_tokens <= kMostTokens,
                 "shape.max_tokens is {}; it must be from 1 to {}", shape.max_tokens, kMostTokens);
  check_argument(static_cast<std::int64_t>(ranks) * shape.max_tokens <= INT32_MAX,
                 "{} ranks of shape.max_tokens {} make more than {} rows", ranks, shape.max_tokens,
                 INT32_MAX);
}

void check_lanes(int lanes) {
  check_argument(lanes >= 1 && lanes <= kMostLanes, "lanes is {}; it must be from 1 to {}", lanes,
                 kMostLanes);
}

void check_stream(const Communicator& communicator, const Stream& stream) {
  const bool cuda = communicator.cuda_device() >= 0;
  check_argument(!stream.present() || stream.is_cuda() == cuda,
                 "stream is {}, but the communicator is on the {} backend",
                 cuda ? "a thread of the CPU backend" : "a CUDA stream", cuda ? "CUDA" : "CPU");
}

void check_topk_idx(const ConstTensorView& topk_idx) {
  check_argument(topk_idx.present() && topk_idx.dimensions() == 2 && topk_idx.contiguous() &&
                     (topk_idx.dtype() == DType::int32 || topk_idx.dtype() == DType::int64),
                 "topk_idx is {}; it must be contiguous int32 or int64 [T, K]", describe(topk_idx));
  check_argument(topk_idx.data() != nullptr || topk_idx.elements() == 0, "topk_idx has no data");
  check_alignment("topk_idx", topk_idx, size_of(topk_idx.dtype()));
}

namespace {

std::string describe_wanted(DType dtype, std::initializer_list<std::int64_t> shape) {
  std::string wanted = fmt::format("contiguous {} [", to_string(dtype));
  for (const std::int64_t* size = shape.begin(); size != shape.end(); ++size)
    wanted += fmt::format("{}{}", size == shape.begin() ? "" : ", ",
                          *size < 0 ? "any" : std::to_string(*size));
  return wanted + "]";
}

}  // namespace

void check_tensor(const char* name, const ConstTensorView& tensor, DType dtype,
                  std::initializer_list<std::int64_t> shape) {
  bool good = tensor.present() && tensor.dtype() == dtype && tensor.contiguous() &&
              tensor.dimensions() == static_cast<int>(shape.size());
  int i = 0;
  for (std::int64_t size : shape) {
    good = good && (size < 0 || tensor.size(i) == size);
    ++i;
  }
  if (!good)
    throw Error(ErrorCode::invalid_argument,
                fmt::format("{} is {}; it must be {}", name, describe(tensor),
                            describe_wanted(dtype, shape)));
  check_argument(tensor.data() != nullptr || tensor.elements() == 0, "{} has no data", name);
  check_alignment(name, tensor, size_of(dtype));
}

void check_per_row(const char* name, const ConstTensorView& tensor, DType dtype,
                   const PerRow& wanted) {
  if (wanted.grouped)
    check_tensor(name, tensor, dtype, {wanted.rows});
  else
    check_tensor(name, tensor, dtype, {wanted.rows, wanted.top_k});
}

void check_rows(const char* name, const ConstTensorView& tensor, DType dtype,
                std::initializer_list<std::int64_t> shape) {
  check_tensor(name, tensor, dtype, shape);
  check_alignment(name, tensor, kRowAlignment);
}

namespace {

bool overlap(const ConstTensorView& a, const ConstTensorView& b) {
  const auto begin = [](const ConstTensorView& t) {
    return reinterpret_cast<std::uintptr_t>(t.data());
  };
  return a.bytes() > 0 && b.bytes() > 0 && begin(a) < begin(b) + b.bytes() &&
         begin(b) < begin(a) + a.bytes();
}

void check_apart(const NamedTensor& output, const NamedTensor& other) {
  check_argument(!overlap(output.tensor, other.tensor),
                 "{} at {} ({} bytes) and {} at {} ({} bytes) overlap; outputs must lie apart from "
                 "inputs and from each other",
                 output.name, fmt::ptr(output.tensor.data()), output.tensor.bytes(), other.name,
                 fmt::ptr(other.tensor.data()), other.tensor.bytes());
}

std::string describe_place(int device) {
  return device == kHost ? "the host" : fmt::format("CUDA device {}", device);
}

void check_place(const Communicator& communicator, const NamedTensor& named) {
  const ConstTensorView& tensor = named.tensor;
  if (tensor.bytes() == 0) return;
  const int device = communicator.cuda_device() >= 0 ? communicator.cuda_device() : kHost;
  int lies = tensor.device();
  if (lies == kUnknownDevice)
    lies = device == kHost ? kHost : device_of_memory(tensor.data(), device);
  if (lies == device) return;
  throw Error(ErrorCode::invalid_argument,
              fmt::format("{} lies in memory of {}; the communicator's backend works on {}",
                          named.name, describe_place(lies), describe_place(device)));
}

}  // namespace

void check_memory(const Communicator& communicator, std::initializer_list<NamedTensor> outputs,
                  std::initializer_list<NamedTensor> inputs) {
  for (const NamedTensor* output = outputs.begin(); output != outputs.end(); ++output) {
    for (const NamedTensor& input : inputs) check_apart(*output, input);
    for (const NamedTensor* other = output + 1; other != outputs.end(); ++other)
      check_apart(*output, *other);
  }
  for (const NamedTensor& input : inputs) check_place(communicator, input);
  for (const NamedTensor& output : outputs) check_place(communicator, output);
}

void check_scales_out(const ConstTensorView& scales, const RowFormat& format,
                      std::initializer_list<std::int64_t> shape) {
  check_argument(format.scales > 0 || !scales.present(),
                 "outputs.scales are given, but rows of {} have none", to_string(format.dtype));
  if (format.scales > 0) check_tensor("outputs.scales", scales, format.scale_dtype(), shape);
}

namespace {

bool is_row_type(DType dtype) {
  return dtype == DType::bf16 || dtype == DType::fp16 || dtype == DType::fp32;
}

void check_row_bytes(const char* name, const MoeShape& most, std::size_t bytes,
                     const ConstTensorView& rows) {
  check_argument(bytes <= most.row_bytes(),
                 "{} is {}, rows of {} bytes with their scales; the object was made for at most {} "
                 "(shape.hidden {} of {})",
                 name, describe(rows), bytes, most.row_bytes(), most.hidden, to_string(most.dtype));
}

}  // namespace

RowFormat check_rows_in(Geometry& geometry, const RowsIn& rows) {
  const MoeShape& most = geometry.most;
  const bool given = rows.x.present() && rows.x.dtype() == DType::fp8_e4m3;
  check_argument(rows.x.dimensions() == 2 && (given || is_row_type(rows.x.dtype())) &&
                     rows.x.size(1) >= 1 && rows.x.size(1) <= kMostHidden,
                 "x is {}; it must be bf16, fp16, fp32 or fp8_e4m3 [T, H]", describe(rows.x));
  MoeShape& call = geometry.call;
  call.hidden = static_cast<int>(rows.x.size(1));
  if (!given) call.dtype = rows.x.dtype();
  check_argument(!(given && rows.cast_to_fp8),
                 "cast_to_fp8 is set, but x is fp8_e4m3 already; give it x of a row type");
  check_argument(given || !rows.x_scales.present(),
                 "x_scales are given, but x is {}; they belong to an x of fp8_e4m3",
                 to_string(rows.x.dtype()));
  check_argument(!rows.cast_to_fp8 || call.hidden % kRowAlignment == 0,
                 "x is {}; to be cast to fp8_e4m3, H must be a multiple of 16", describe(rows.x));
  const RowFormat format =
      RowFormat::of(given || rows.cast_to_fp8 ? DType::fp8_e4m3 : call.dtype, call.hidden);
  check_rows("x", rows.x, rows.x.dtype(), {-1, call.hidden});
  const std::size_t width = static_cast<std::size_t>(call.hidden) * size_of(rows.x.dtype());
  check_argument(width % kRowAlignment == 0, "x is {}, {} bytes a row; it must be a multiple of 16",
                 describe(rows.x), width);
  check_row_bytes("x", most, std::max<std::size_t>(width, format.data_bytes + format.scale_bytes()),
                  rows.x);
  if (given)
    check_tensor("x_scales", rows.x_scales, format.scale_dtype(), {rows.x.size(0), format.scales});
  return format;
}

void check_experts(Geometry& geometry, int experts) {
  if (experts == 0) return;
  check_argument(experts <= geometry.most.experts,
                 "experts is {}; the object was made for at most shape.experts = {}", experts,
                 geometry.most.experts);
  check_expert_count(experts, geometry.ranks);
  geometry.call.experts = experts;
}

void check_max_tokens(Geometry& geometry, int max_tokens) {
  if (max_tokens == 0) return;
  check_argument(max_tokens >= 1 && max_tokens <= geometry.most.max_tokens,
                 "max_tokens is {}; it must be from 1 to shape.max_tokens = {}, or 0", max_tokens,
                 geometry.most.max_tokens);
  geometry.call.max_tokens = max_tokens;
}

void check_routing(Geometry& geometry, std::int64_t tokens, const ConstTensorView& topk_idx,
                   const ConstTensorView& topk_weights) {
  check_argument(tokens <= geometry.call.max_tokens,
                 "x has {} tokens; it must have at most max_tokens = {}", tokens,
                 geometry.call.max_tokens);
  check_topk_idx(topk_idx);
  const std::int64_t top_k = topk_idx.size(1);
  check_argument(top_k >= 1 && top_k <= geometry.most.top_k,
                 "topk_idx is {}; K must be from 1 to shape.top_k = {}", describe(topk_idx),
                 geometry.most.top_k);
  check_tensor("topk_idx", topk_idx, topk_idx.dtype(), {tokens, top_k});
  geometry.call.top_k = static_cast<int>(top_k);
  if (topk_weights.present())
    check_tensor("topk_weights", topk_weights, DType::fp32, {tokens, top_k});
}

DType check_rows_home(const MoeShape& most, const ConstTensorView& y,
                      std::initializer_list<std::int64_t> shape) {
  check_argument(y.present() && is_row_type(y.dtype()), "y is {}; it must be bf16, fp16 or fp32",
                 describe(y));
  check_rows("y", y, y.dtype(), shape);
  const std::size_t bytes = static_cast<std::size_t>(*(shape.end() - 1)) * size_of(y.dtype());
  check_argument(bytes % kRowAlignment == 0, "y is {}, {} bytes a row; it must be a multiple of 16",
                 describe(y), bytes);
  check_row_bytes("y", most, bytes, y);
  return y.dtype();
}

}  // namespace expertwire::ep
