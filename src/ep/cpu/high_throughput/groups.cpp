#include <algorithm>
#include <array>
#include <cstring>

#include "ep/cpu/high_throughput/lane.hpp"
#include "ep/cpu/stream_rule.hpp"
#include "ep/cpu/vector_ops.hpp"

namespace expertwire::inline v0::ep::cpu {

// Rows that are grouped by expert: one comes for a token, and has a copy for each of its selections
// here; on the way home the copies' rows are added before one goes.

// Dispatch -------------------------------------------------------------------------------------

/// Copies a row to the places of its selections, which the handle remembers.
void HighThroughputLane::expand_row(const Dispatch& op, const Arrived& row, const RowPlace& from,
                                    bool stream) const {
  HighThroughputHandle& handle = routing_of(op);
  const RowFormat& format = handle.format;
  std::int32_t* places = handle.places_of(row.source, row.i);
  std::array<void*, kMostTopK> copies;
  int count = 0;
  for (int k = 0; k < shape_.top_k; ++k) {
    places[k] = -1;
    if (from.experts[k] < 0) continue;
    const Run run = handle.run_in(row.source, from.experts[k]);
    const auto position = static_cast<std::uint32_t>(from.positions[k]);
    if (!run.has_room(position)) continue;
    places[k] = static_cast<std::int32_t>(run.place(position));
    const RowPlace to = place_in(op.outputs, places[k], format, /*top_k=*/1);
    copies[index(count++)] = to.x;
    *to.token = *from.token;
    *to.experts = from.experts[k];
    *to.weights = from.weights[k];
    if (format.scales > 0) std::memcpy(to.scales, from.scales, format.scale_bytes());
  }
  if (count > 0) vector_ops().copy(copies.data(), count, from.x, format.data_bytes, stream);
}

/// The same of this rank's own token, its `row`-th here.
void HighThroughputLane::expand_own_row(const Dispatch& op, int token, std::int64_t row,
                                        bool stream) const {
  const HighThroughputHandle& handle = routing_of(op);
  const RowFormat& format = handle.format;
  std::int32_t own_token = 0;
  std::array<std::int32_t, kMostTopK> experts, positions;
  std::array<float, kMostTopK> weights;
  // What is read of a place is not written.
  const auto* x = op.request.x.as<std::byte>() + index(token) * format.data_bytes;
  const auto* scales =
      format.scales > 0 ? op.request.x_scales.as<std::byte>() + index(token) * format.scale_bytes()
                        : nullptr;
  const RowPlace own{
      const_cast<std::byte*>(x),     &own_token, experts.data(), weights.data(), positions.data(),
      const_cast<std::byte*>(scales)};
  write_beside(op, token, memory_.rank(), own);
  expand_row(op, {memory_.rank(), row}, own, stream);
}

/// Rows of the output that nothing came for: those that pad groups are zeros, and none of them, nor
/// of the rest of a capacity, is a token's. A worker has every W-th.
void HighThroughputLane::pad_output(const Dispatch& op, int worker) const {
  if (!op.outputs.x.present()) return;
  const HighThroughputHandle& handle = routing_of(op);
  const RowFormat& format = handle.format;
  const int top_k = handle.grouped ? 1 : shape_.top_k;
  const std::int64_t rows = op.outputs.x.size(0);
  const auto blank = [&](std::int64_t begin, std::int64_t end, bool zeros) {
    for (std::int64_t row = begin + worker; row < std::min(end, rows); row += team_.size()) {
      const RowPlace to = place_in(op.outputs, row, format, top_k);
      *to.token = -1;
      std::fill_n(to.experts, top_k, -1);
      std::fill_n(to.weights, top_k, 0.0F);
      if (format.scales > 0) std::memset(to.scales, 0, format.scale_bytes());
      if (zeros) std::memset(to.x, 0, format.data_bytes);
    }
  };
  if (handle.grouped)
    for (std::size_t e = 0; e + 1 < handle.group_offsets.size(); ++e)
      blank(std::int64_t{handle.group_offsets[e]} + handle.selections_per_expert[e],
            handle.group_offsets[e + 1], true);
  blank(handle.came, rows, false);
}

// Combine --------------------------------------------------------------------------------------

/// Adds what experts made of a token's copies, in top-k order.
void HighThroughputLane::sum_group(const Combine& op, const Arrived& row, std::byte* out) const {
  const std::int32_t* places = routing_of(op).places_of(row.source, row.i);
  const ConstTensorView& given = op.request.row_weights;
  std::array<const void*, kMostTopK> rows;
  std::array<float, kMostTopK> weights;
  SumRequest sum;
  for (int k = 0; k < shape_.top_k; ++k) {
    if (places[k] < 0) continue;
    const auto i = index(sum.count++);
    rows[i] = op.request.y.as<std::byte>() + index(places[k]) * shape_.row_bytes();
    weights[i] = given.present() ? given.as<float>()[places[k]] : 1.0F;
  }
  sum.dtype = shape_.dtype;
  sum.elements = index(shape_.hidden);
  sum.rows = rows.data();
  sum.weights = weights.data();
  sum.out = out;
  vector_ops().sum(sum);
}

/// The weights of a token's copies that go home, [K].
void HighThroughputLane::weigh_group(const Combine& op, const Arrived& row, float* out) const {
  const std::int32_t* places = routing_of(op).places_of(row.source, row.i);
  for (int k = 0; k < shape_.top_k; ++k)
    out[k] = places[k] < 0 ? 0.0F : op.request.topk_weights.as<float>()[places[k]];
}

}  // namespace expertwire::ep::cpu
