#include "ep/cpu/low_latency/lane.hpp"

#include <algorithm>
#include <cstring>

#include "ep/cpu/vector_ops.hpp"

namespace expertwire::inline v0::ep::cpu {

// Dispatch, send half --------------------------------------------------------------------------

void LowLatencyLane::send_dispatch(const Dispatch& op, WaitContext context) {
  const auto lane = memory_.direction(memory_.slots().dispatch);
  const Epoch n = lane.sending();
  const Route& route = routing_of(op).route;
  context.abandoned = team_.failed();
  team_.run([&](int worker) {
    if (worker == 0) send_counts(op, n, context);
    std::vector<bool> credited(index(memory_.size()), false);
    std::vector<std::byte> packed(
        op.request.cast_to_fp8 ? op.format.data_bytes + op.format.scale_bytes() : 0);
    const Span tokens = part_of(route.tokens, worker, team_.size());
    for (auto t = static_cast<int>(tokens.begin); t < tokens.end; ++t) {
      const Destination* list = route.destinations_of(t);
      const Payload payload = op.request.cast_to_fp8 && list[0].rank >= 0
                                  ? cast_row(op, t, packed.data())
                                  : payload_of(op, t);
      for (int i = 0; i < route.width() && list[i].rank >= 0; ++i) {
        if (!credited[index(list[i].rank)]) {
          memory_.await_credit(memory_.slots().dispatch, list[i].rank, n, context);
          credited[index(list[i].rank)] = true;
        }
        send_row(op, t, payload, list[i], n);
      }
    }
    lane.finish_send(n, static_cast<std::uint32_t>(team_.size()));
  });
}

/// Counts go to every rank, zeros too, before any row.
void LowLatencyLane::send_counts(const Dispatch& op, Epoch n, const WaitContext& context) {
  const auto& slots = memory_.slots();
  const Route& route = routing_of(op).route;
  const int local = route.placement.local_experts();
  const Call call = routing_of(op).call(0, op.format);
  routing_of(op).epoch = n;
  for_each_peer(memory_.rank(), memory_.size(), [&](int peer) {
    memory_.await_credit(slots.dispatch, peer, n, context);
    memory_.tell_call(slots.dispatch, peer, n, call, n);
    const std::uint64_t counts = slots.counts_of(n);
    memory_.tell(peer, counts, slots.kRows, {route.rows_to_rank[index(peer)], n});
    for (int e = 0; e < local; ++e)
      memory_.tell(peer, counts, slots.kHeader + e,
                   {route.rows_to_expert[index(peer * local + e)], n});
  });
}

/// A row as the caller gave it.
LowLatencyLane::Payload LowLatencyLane::payload_of(const Dispatch& op, int token) const {
  return {op.request.x.as<std::byte>() + index(token) * op.format.data_bytes,
          op.request.x_scales.as<std::byte>() + index(token) * op.format.scale_bytes()};
}

LowLatencyLane::Payload LowLatencyLane::cast_row(const Dispatch& op, int token,
                                                 std::byte* packed) const {
  std::byte* scales = packed + op.format.data_bytes;
  CastRequest cast;
  cast.dtype = shape_.dtype;
  cast.elements = index(shape_.hidden);
  cast.x = op.request.x.as<std::byte>() + index(token) * shape_.row_bytes();
  cast.out = packed;
  cast.scales = reinterpret_cast<float*>(scales);
  vector_ops().cast(cast);
  return {packed, scales};
}

void LowLatencyLane::send_row(const Dispatch& op, int token, const Payload& payload,
                              const Destination& to, Epoch n) const {
  const auto& slots = memory_.slots();
  const Route& route = routing_of(op).route;
  auto* header = memory_.outbox<RowHeader>(to.rank, slots.row_of(n, to.row));
  auto* selections = reinterpret_cast<Selection*>(header + 1);
  const std::int32_t* experts = route.experts_of(token);
  const float* weights = routing_of(op).weighted ? op.request.topk_weights.as<float>() +
                                                       index(token) * index(route.top_k)
                                                 : nullptr;
  for (int k = 0; k < route.top_k; ++k)
    selections[k] = {experts[k], route.positions_of(token)[k],
                     weights != nullptr ? weights[k] : 1.0F};
  header->token = token;
  if (to.rank != memory_.rank() ||
      op.request.cast_to_fp8) {  // else own rows are expanded from x itself
    std::byte* place = reinterpret_cast<std::byte*>(header) + slots.header_bytes;
    void* data = place;
    vector_ops().copy(&data, 1, payload.data, op.format.data_bytes, false);
    if (op.format.scales > 0)
      std::memcpy(place + op.format.data_bytes, payload.scales, op.format.scale_bytes());
  }
  memory_.announce(to.rank, slots.row_flag_of(n, to.row), n);
}

// Dispatch, receive half -----------------------------------------------------------------------

void LowLatencyLane::receive_dispatch(const Dispatch& op, WaitContext context) {
  const auto& slots = memory_.slots();
  const auto lane = memory_.direction(slots.dispatch);
  const Epoch n = lane.receiving();
  await_counts(op, n, context);
  context.abandoned = team_.failed();
  team_.run([&](int worker) {
    for_each_peer(memory_.rank(), memory_.size(), [&](int source) {
      const std::int32_t rows = routing_of(op).rows_from[index(source)];
      for (std::int32_t row = worker; row < rows; row += team_.size()) {
        const auto* flag = memory_.inbox<Epoch>(source, slots.row_flag_of(n, row));
        wait_until(context, source, Phase::dispatch_rows, static_cast<std::uint64_t>(row),
                   [&] { return arrived<HostAccess>(flag, n); });
        expand_row(op, source, row, n);
      }
    });
    vector_ops().store_fence();
    lane.finish_receive(n, static_cast<std::uint32_t>(team_.size()));
  });
  memory_.grant_all(slots.dispatch, n);
}

/// Turns the sources' counts into places: within an expert, rows go by source, then by token. Only
/// repeated experts can bring more rows than the output of an expert has; the last ones are
/// dropped.
void LowLatencyLane::await_counts(const Dispatch& op, Epoch n, const WaitContext& context) {
  LowLatencyHandle& handle = routing_of(op);
  const int local = handle.route.placement.local_experts(), size = memory_.size();
  std::memset(op.outputs.tokens_per_expert.data(), 0, index(local) * sizeof(std::int32_t));
  handle.rows_from.assign(index(size), 0);
  handle.first_from.assign(index(size) + 1, 0);
  for (int source = 0; source < size; ++source) take_counts(op, source, n, context);
  const std::size_t entries = index(handle.first_from.back()) * index(shape_.top_k);
  handle.copies.assign(entries, LowLatencyHandle::kEnd);
  handle.weights.assign(entries, 0.0F);
}

void LowLatencyLane::take_counts(const Dispatch& op, int source, Epoch n,
                                 const WaitContext& context) {
  const auto& slots = memory_.slots();
  LowLatencyHandle& handle = routing_of(op);
  const ExpertMajor layout{op.outputs.x.size(1)};
  auto* per_expert = op.outputs.tokens_per_expert.as<std::int32_t>();
  auto* ranges = op.outputs.ranges.as<SourceRange>();
  const auto* counts = memory_.inbox<Tagged>(source, slots.counts_of(n));
  auto count = [&](int i) { return memory_.await_count(counts + i, source, n, context); };
  memory_.compare_call(slots.dispatch, source, n, context);
  handle.rows_from[index(source)] = count(slots.kRows);
  handle.first_from[index(source) + 1] =
      handle.first_from[index(source)] + handle.rows_from[index(source)];
  for (int e = 0; e < handle.route.placement.local_experts(); ++e) {
    SourceRange& range = ranges[index(e) * index(memory_.size()) + index(source)];
    const std::int32_t came = count(slots.kHeader + e);
    const std::uint32_t fitting =
        layout.run(e, per_expert[e]).fitting(static_cast<std::uint32_t>(came));
    range = {static_cast<std::int32_t>(fitting), per_expert[e]};
    per_expert[e] += range.rows;
    handle.dropped_rows += came - range.rows;
  }
}

/// Copies a row to each of its experts, and notes in the handle where.
void LowLatencyLane::expand_row(const Dispatch& op, int source, std::int32_t row, Epoch n) const {
  const auto& slots = memory_.slots();
  const auto* header = memory_.inbox<RowHeader>(source, slots.row_of(n, row));
  const auto* selections = reinterpret_cast<const Selection*>(header + 1);
  const std::size_t size = index(memory_.size());
  const ExpertMajor layout{op.outputs.x.size(1)};
  const auto* ranges = op.outputs.ranges.as<SourceRange>();
  LowLatencyHandle& handle = routing_of(op);
  const Placement& placement = handle.route.placement;
  const std::size_t entry = index(handle.first_from[index(source)] + row) * index(shape_.top_k);
  const std::size_t scale_bytes = op.format.scale_bytes();
  const auto* in_slot = reinterpret_cast<const std::byte*>(header) + slots.header_bytes;
  const Payload payload = source == memory_.rank() && !op.request.cast_to_fp8
                              ? payload_of(op, header->token)
                              : Payload{in_slot, in_slot + op.format.data_bytes};
  void* places[kMostTopK];
  int copies = 0;
  std::size_t next = entry;
  for (int k = 0; k < shape_.top_k; ++k) {
    const Selection& selection = selections[k];
    if (selection.expert < 0 || placement.rank_of(selection.expert) != memory_.rank()) continue;
    const std::size_t i = next++;
    const int expert = placement.local_index(selection.expert);
    const Run run = layout.run(expert, ranges[index(expert) * size + index(source)].first);
    const auto position = static_cast<std::uint32_t>(selection.position);
    handle.weights[i] = selection.weight;
    handle.copies[i] = LowLatencyHandle::kDropped;
    if (!run.has_room(position)) continue;
    const std::size_t place = run.place(position);
    places[copies++] = op.outputs.x.as<std::byte>() + place * op.format.data_bytes;
    if (scale_bytes > 0)
      std::memcpy(op.outputs.scales.as<std::byte>() + place * scale_bytes, payload.scales,
                  scale_bytes);
    op.outputs.source_tokens.as<std::int32_t>()[place] = header->token;
    handle.copies[i] = static_cast<std::int64_t>(place);
  }
  vector_ops().copy(places, copies, payload.data, op.format.data_bytes, true);
}

}  // namespace expertwire::ep::cpu
