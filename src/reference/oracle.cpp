#include "reference/oracle.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace expertwire::reference {

namespace {

/// The number that an fp16 code stands for.
float fp16_value(std::uint16_t code) {
  const int exponent = code >> 10 & 31, mantissa = code & 1023;
  if (exponent == 31) return mantissa == 0 ? ((code & 0x8000) != 0 ? -INFINITY : INFINITY) : NAN;
  const double size =
      exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return static_cast<float>((code & 0x8000) != 0 ? -size : size);
}

/// The code of the nearest fp16 number, of two as near the even one.
std::uint16_t fp16_code(float value) {
  if (std::isnan(value)) return 0x7FFF;
  const double size = std::abs(static_cast<double>(value));
  std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (size == 0) return sign;
  if (size >= 65520) return sign | 0x7C00;
  int exponent = 0;
  std::frexp(size, &exponent);  // size = fraction * 2^exponent, 0.5 <= fraction < 1
  const int unit = std::max(exponent - 11, -24);
  const double steps = std::nearbyint(std::ldexp(size, -unit));  // ties to even
  const auto whole = static_cast<int>(steps);                    // at most 2048
  if (unit == -24 && whole < 1024) return static_cast<std::uint16_t>(sign | whole);
  // A carry into the next exponent is what the sum makes of it.
  return static_cast<std::uint16_t>(sign | (((unit + 25) << 10) + whole - 1024));
}

}  // namespace

float round_to(DType dtype, float value) {
  if (dtype == DType::fp32 || std::isnan(value)) return value;
  if (dtype == DType::fp16) return fp16_value(fp16_code(value));
  std::uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  const std::uint32_t low = bits & 0xFFFF;
  bits &= 0xFFFF0000;
  if (low > 0x8000 || (low == 0x8000 && (bits & 0x10000) != 0)) bits += 0x10000;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

Row decode(DType dtype, const std::byte* row, std::size_t elements) {
  Row values(elements);
  for (std::size_t h = 0; h < elements; ++h) {
    std::uint32_t bits = 0;
    if (dtype == DType::fp8_e4m3) {
      const float value = e4m3_value(static_cast<std::uint8_t>(row[h]));
      std::memcpy(&bits, &value, sizeof(bits));
    } else if (dtype == DType::fp16) {
      std::uint16_t code = 0;
      std::memcpy(&code, row + 2 * h, sizeof(code));
      const float value = fp16_value(code);
      std::memcpy(&bits, &value, sizeof(bits));
    } else if (dtype == DType::bf16) {
      std::uint16_t top = 0;
      std::memcpy(&top, row + 2 * h, sizeof(top));
      bits = static_cast<std::uint32_t>(top) << 16;
    } else {
      std::memcpy(&bits, row + 4 * h, sizeof(bits));
    }
    std::memcpy(&values[h], &bits, sizeof(bits));
  }
  return values;
}

void encode(DType dtype, const Row& row, std::byte* out) {
  for (std::size_t h = 0; h < row.size(); ++h) {
    const float value = round_to(dtype, row[h]);
    std::uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof(bits));
    if (dtype == DType::bf16) {
      const auto top = static_cast<std::uint16_t>(bits >> 16);
      std::memcpy(out + 2 * h, &top, sizeof(top));
    } else if (dtype == DType::fp16) {
      const std::uint16_t code = fp16_code(value);
      std::memcpy(out + 2 * h, &code, sizeof(code));
    } else {
      std::memcpy(out + 4 * h, &bits, sizeof(bits));
    }
  }
}

float e4m3_value(std::uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  if (exponent == 15 && mantissa == 7) return std::nanf("");
  const double size =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return static_cast<float>((code & 0x80) != 0 ? -size : size);
}

namespace {

/// The nearest code; of two as near, the even one.
std::uint8_t nearest_e4m3(float value) {
  if (std::isnan(value)) return 0x7F;
  static const std::vector<float> kSizes = [] {  // ascending: a larger code is a larger number
    std::vector<float> sizes;
    for (std::uint8_t code = 0; code < 0x7F; ++code) sizes.push_back(e4m3_value(code));
    return sizes;
  }();
  const float size = std::abs(value);
  auto code = static_cast<std::size_t>(std::lower_bound(kSizes.begin(), kSizes.end(), size) -
                                       kSizes.begin());
  if (code == kSizes.size()) {
    --code;
  } else if (code > 0) {
    const double above = static_cast<double>(kSizes[code]) - static_cast<double>(size);
    const double below = static_cast<double>(size) - static_cast<double>(kSizes[code - 1]);
    if (below < above || (below == above && code % 2 == 1)) --code;
  }
  return static_cast<std::uint8_t>(code | (std::signbit(value) ? 0x80 : 0));
}

}  // namespace

Fp8Row to_fp8(const Row& row) {
  Fp8Row out;
  for (std::size_t first = 0; first < row.size(); first += 128) {
    const std::size_t end = std::min(row.size(), first + 128);
    float most = 1e-4F;
    for (std::size_t h = first; h < end; ++h) most = std::max(most, std::abs(row[h]));
    const float inverse = 448.0F / most;
    for (std::size_t h = first; h < end; ++h)
      out.data.push_back(static_cast<std::byte>(nearest_e4m3(row[h] * inverse)));
    out.scales.push_back(most / 448.0F);
  }
  return out;
}

Row Fp8Row::values() const {
  Row values;
  for (std::size_t h = 0; h < data.size(); ++h)
    values.push_back(e4m3_value(static_cast<std::uint8_t>(data[h])) * scales[h / 128]);
  return values;
}

Row apply_expert(DType dtype, int expert, const Row& x) {
  const std::size_t n = x.size(), shift = static_cast<std::size_t>(expert * 7 + 1) % n;
  const float scale = 0.5F + static_cast<float>(expert % 13) * 0.0625F;
  Row y(n);
  for (std::size_t h = 0; h < n - shift; ++h) y[h] = round_to(dtype, scale * x[h + shift]);
  for (std::size_t h = n - shift; h < n; ++h) y[h] = round_to(dtype, scale * x[h + shift - n]);
  return y;
}

Oracle::Oracle(const Workload& workload, int step, bool fp8)
    : workload_(workload),
      step_(step),
      fp8_(fp8),
      ranks_(workload.spec().ranks),
      top_k_(workload.spec().shape.top_k),
      local_(workload.spec().shape.experts / ranks_),
      dtype_(workload.spec().shape.dtype) {
  for (int rank = 0; rank < ranks_; ++rank) {
    ids_.push_back(workload.topk_idx(rank, step));
    weights_.push_back(workload.topk_weights(rank, step));
  }
  std::vector<std::int64_t> so_far(at(workload.spec().shape.experts), 0);
  for (int source = 0; source < ranks_; ++source) {
    of_expert_.emplace_back();
    for (std::int64_t id : ids_[at(source)])
      of_expert_.back().push_back(id < 0 ? -1 : so_far[at(id)]++);
  }
  of_all_ = so_far;
  // Index of each token among the rows of (source, rank), counted over all earlier sources: its
  // row in token-major layout.
  row_at_.assign(at(ranks_), std::vector<std::vector<std::int64_t>>(at(ranks_)));
  for (int rank = 0; rank < ranks_; ++rank) {
    std::int64_t row = 0;
    for (int source = 0; source < ranks_; ++source)
      for (int t = 0; t < tokens(source); ++t) {
        bool here = false;
        for (int k = 0; k < top_k_; ++k) {
          const std::int64_t id = ids_[at(source)][at(t * top_k_ + k)];
          here = here || (id >= 0 && rank_of(id) == rank);
        }
        row_at_[at(source)][at(rank)].push_back(here ? row++ : -1);
      }
  }
}

std::vector<ReceivedRow> Oracle::token_major(int rank) const {
  std::vector<ReceivedRow> rows;
  for (int source = 0; source < ranks_; ++source)
    for (int t = 0; t < tokens(source); ++t) {
      if (row_at_[at(source)][at(rank)][at(t)] < 0) continue;
      ReceivedRow row{source, t, {}, {}};
      for (int k = 0; k < top_k_; ++k) {
        const std::int64_t id = ids_[at(source)][at(t * top_k_ + k)];
        const bool here = id >= 0 && rank_of(id) == rank;
        row.experts.push_back(here ? static_cast<std::int32_t>(id) % local_ : -1);
        row.weights.push_back(here ? weights_[at(source)][at(t * top_k_ + k)] : 0.0F);
      }
      rows.push_back(std::move(row));
    }
  return rows;
}

std::vector<ReceivedRow> Oracle::expert_major(int rank, int local_expert) const {
  std::vector<ReceivedRow> rows;
  for (int source = 0; source < ranks_; ++source)
    for (int t = 0; t < tokens(source); ++t)
      for (int k = 0; k < top_k_; ++k)
        if (ids_[at(source)][at(t * top_k_ + k)] == rank * local_ + local_expert &&
            of_expert_[at(source)][at(t * top_k_ + k)] < rows_per_expert())
          rows.push_back({source, t, {}, {}});
  return rows;
}

std::vector<ReceivedRow> Oracle::grouped(int rank, int alignment) const {
  std::vector<ReceivedRow> rows;
  for (int e = 0; e < local_; ++e) {
    for (int source = 0; source < ranks_; ++source)
      for (std::size_t i = 0; i < ids_[at(source)].size(); ++i)
        if (ids_[at(source)][i] == rank * local_ + e)
          rows.push_back({source,
                          static_cast<int>(i) / top_k_,
                          {static_cast<std::int32_t>(e)},
                          {weights_[at(source)][i]}});
    while (rows.size() % at(alignment) != 0) rows.push_back({-1, -1, {-1}, {0.0F}});
  }
  return rows;
}

std::int64_t Oracle::grouped_row(int source, std::int64_t selection, int alignment) const {
  const std::int64_t expert = ids_[at(source)][at(selection)];
  std::int64_t first = 0;
  for (std::int64_t e = expert - expert % local_; e < expert; ++e)
    first += (of_all_[at(e)] + alignment - 1) / alignment * alignment;
  return first + of_expert_[at(source)][at(selection)];
}

Row Oracle::row_of(int source, int token, bool bias) const {
  std::vector<std::byte> bytes(workload_.spec().shape.row_bytes());
  workload_.fill_row(source, step_, token, bias, bytes.data());
  return decode(dtype_, bytes.data(), at(workload_.spec().shape.hidden));
}

/// The row that experts work on.
Row Oracle::received(int source, int token) const {
  const Row row = row_of(source, token, false);
  return fp8_ ? to_fp8(row).values() : row;
}

std::int64_t Oracle::rows_per_expert() const {
  return static_cast<std::int64_t>(ranks_) * workload_.spec().shape.max_tokens;
}

Row Oracle::partial(int source, int token, int expert_rank, Weights weights, Layout layout,
                    const Capacities* capacities) const {
  const Row x = received(source, token);
  Row acc(x.size(), 0.0F);
  for (int k = 0; k < top_k_; ++k) {
    const std::size_t i = at(token * top_k_ + k);
    const std::int64_t id = ids_[at(source)][i];
    if (id < 0 || rank_of(id) != expert_rank) continue;
    if (layout == Layout::expert_major && of_expert_[at(source)][i] >= rows_per_expert()) continue;
    if (layout == Layout::grouped && capacities != nullptr &&
        grouped_row(source, static_cast<std::int64_t>(i), capacities->alignment) >=
            capacities->rows[at(expert_rank)])
      continue;
    const Row y = apply_expert(dtype_, static_cast<int>(id), x);
    const float w = weights == Weights::given ? weights_[at(source)][i] : 1.0F;
    for (std::size_t h = 0; h < acc.size(); ++h) acc[h] = std::fma(w, y[h], acc[h]);
  }
  for (float& value : acc) value = round_to(dtype_, value);
  return acc;
}

Row Oracle::combined(int source, int token, Weights weights, bool bias, Layout layout,
                     const Capacities* capacities) const {
  Row total = bias ? row_of(source, token, true) : Row(at(workload_.spec().shape.hidden), 0.0F);
  for (int rank = 0; rank < ranks_; ++rank) {
    const std::int64_t row = row_at_[at(source)][at(rank)][at(token)];
    const bool clips = layout == Layout::token_major && capacities != nullptr;
    if (row < 0 || (clips && row >= capacities->rows[at(rank)])) continue;
    const Row part = partial(source, token, rank, weights, layout, capacities);
    for (std::size_t h = 0; h < total.size(); ++h) total[h] += part[h];
  }
  for (float& value : total) value = round_to(dtype_, value);
  return total;
}

std::vector<double> Oracle::dense(int source, int token) const {
  const Row x = received(source, token);
  std::vector<double> total(x.size(), 0.0);
  for (int k = 0; k < top_k_; ++k) {
    const std::size_t i = at(token * top_k_ + k);
    const std::int64_t id = ids_[at(source)][i];
    if (id < 0) continue;
    const Row y = apply_expert(DType::fp32, static_cast<int>(id), x);
    for (std::size_t h = 0; h < total.size(); ++h)
      total[h] += static_cast<double>(weights_[at(source)][i]) * static_cast<double>(y[h]);
  }
  return total;
}

}  // namespace expertwire::reference
