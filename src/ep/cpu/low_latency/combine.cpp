#include "ep/cpu/low_latency/lane.hpp"

#include <algorithm>
#include <cstring>

#include "ep/cpu/vector_ops.hpp"

namespace expertwire::inline v0::ep::cpu {

// Combine, send half ---------------------------------------------------------------------------

void LowLatencyLane::send_combine(const Combine& op, WaitContext context) {
  const auto& slots = memory_.slots();
  const auto lane = memory_.direction(slots.combine);
  const Epoch n = lane.sending();
  for_each_peer(memory_.rank(), memory_.size(),
                [&](int peer) { memory_.await_credit(slots.combine, peer, n, context); });
  const std::int32_t options = op.request.topk_weights.present() ? Call::kWeights : 0;
  memory_.tell_call(
      slots.combine, n,
      routing_of(op).call(options, RowFormat::of(op.request.y.dtype(), shape_.hidden)),
      routing_of(op).epoch);
  if (op.request.topk_weights.present()) send_weights(op, n);
  const bool weighted = weights_come(op, n, context);
  context.abandoned = team_.failed();
  team_.run([&](int worker) {
    for_each_peer(memory_.rank(), memory_.size(), [&](int source) {
      const std::int32_t rows = routing_of(op).rows_from[index(source)];
      if (source == memory_.rank() || worker >= rows) return;  // own rows: see sum_token
      if (weighted) {
        memory_.compare_call(slots.combine, source, n, context);
        const auto* flag = memory_.inbox<Epoch>(source, slots.combine.flag_of(n));
        wait_until(context, source, Phase::combine_weights, n,
                   [&] { return arrived<HostAccess>(flag, n); });
      }
      for (std::int32_t row = worker; row < rows; row += team_.size()) {
        sum_partial(op, {source, row}, n, weighted,
                    memory_.outbox<std::byte>(source, slots.partial_of(n, row)));
        memory_.announce(source, slots.partial_flag_of(n, row), n);
      }
    });
    lane.finish_send(n, static_cast<std::uint32_t>(team_.size()));
  });
}

/// Ships the weights of this rank's tokens to the ranks that sum for them: 4 bytes a selection.
/// They are written, as rows are, after credit.
void LowLatencyLane::send_weights(const Combine& op, Epoch n) const {
  const auto& slots = memory_.slots();
  const Route& route = routing_of(op).route;
  for (int t = 0; t < route.tokens; ++t) {
    const Destination* list = route.destinations_of(t);
    const std::int32_t* experts = route.experts_of(t);
    const float* given = op.request.topk_weights.as<float>() + index(t) * index(route.top_k);
    for (int i = 0; i < route.width() && list[i].rank >= 0; ++i) {
      auto* weights = memory_.outbox<float>(list[i].rank, slots.weights_of(n, list[i].row));
      for (int k = 0; k < route.top_k; ++k)
        if (experts[k] >= 0 && route.placement.rank_of(experts[k]) == list[i].rank)
          *weights++ = given[k];
    }
  }
  for_each_peer(memory_.rank(), memory_.size(),
                [&](int peer) { memory_.announce(peer, slots.combine.flag_of(n), n); });
}

/// Whether ranks send weights with this combine. One without tokens has none to give: it asks one
/// that it sums for.
bool LowLatencyLane::weights_come(const Combine& op, Epoch n, const WaitContext& context) const {
  if (routing_of(op).tokens > 0) return op.request.topk_weights.present();
  const auto& from = routing_of(op).rows_from;
  const auto first = std::find_if(from.begin(), from.end(), [](auto rows) { return rows > 0; });
  if (first == from.end()) return false;
  const auto source = static_cast<int>(first - from.begin());
  const std::int32_t options =
      memory_.await_call(memory_.slots().combine, source, n, Call::kKind, context);
  return (options & Call::kWeights) != 0;
}

/// Sums what this rank's experts made of one token.
void LowLatencyLane::sum_partial(const Combine& op, const Destination& of, Epoch n, bool weighted,
                                 std::byte* out) const {
  const auto& slots = memory_.slots();
  const LowLatencyHandle& handle = routing_of(op);
  const std::size_t entry = index(handle.first_from[index(of.rank)] + of.row) * index(shape_.top_k);
  const float* given = weighted ? memory_.inbox<float>(of.rank, slots.weights_of(n, of.row))
                                : &handle.weights[entry];
  const void* rows[kMostTopK];
  float weights[kMostTopK];
  SumRequest sum;
  for (int i = 0; i < shape_.top_k; ++i) {
    const std::int64_t place = handle.copies[entry + index(i)];
    if (place == LowLatencyHandle::kEnd) break;
    if (place == LowLatencyHandle::kDropped) continue;
    rows[sum.count] = op.request.y.as<std::byte>() + index(place) * shape_.row_bytes();
    weights[sum.count++] = given[i];
  }
  sum.dtype = shape_.dtype;
  sum.elements = index(shape_.hidden);
  sum.rows = rows;
  sum.weights = weights;
  sum.out = out;
  vector_ops().sum(sum);
}

// Combine, receive half ------------------------------------------------------------------------

void LowLatencyLane::receive_combine(const Combine& op, WaitContext context) {
  const auto lane = memory_.direction(memory_.slots().combine);
  const Epoch n = lane.receiving();
  memory_.compare_calls(
      memory_.slots().combine, n,
      [&](int peer) { return routing_of(op).route.rows_to_rank[index(peer)] > 0; }, context);
  context.abandoned = team_.failed();
  team_.run([&](int worker) {
    std::vector<std::byte> own_partial(shape_.row_bytes());
    const Span tokens = part_of(routing_of(op).route.tokens, worker, team_.size());
    for (auto t = static_cast<int>(tokens.begin); t < tokens.end; ++t)
      sum_token(op, t, n, own_partial.data(), context);
    vector_ops().store_fence();
    lane.finish_receive(n, static_cast<std::uint32_t>(team_.size()));
  });
  memory_.grant_all(memory_.slots().combine, n);
}

/// Adds the partial sums of a token's ranks in ascending order of rank. This rank's own partial
/// does not go through a slot: it is made here, where it is still in cache when it is added.
void LowLatencyLane::sum_token(const Combine& op, int token, Epoch n, std::byte* own_partial,
                               const WaitContext& context) const {
  const auto& slots = memory_.slots();
  const Route& route = routing_of(op).route;
  const Destination* list = route.destinations_of(token);
  const void* rows[kMostTopK];
  int count = 0;
  for (; count < route.width() && list[count].rank >= 0; ++count) {
    const Destination& from = list[count];
    if (from.rank == memory_.rank()) {
      sum_partial(op, from, n, op.request.topk_weights.present(), own_partial);
      rows[count] = own_partial;
      continue;
    }
    const auto* flag = memory_.inbox<Epoch>(from.rank, slots.partial_flag_of(n, from.row));
    wait_until(context, from.rank, Phase::combine_rows, static_cast<std::uint64_t>(from.row),
               [&] { return arrived<HostAccess>(flag, n); });
    rows[count] = memory_.inbox<std::byte>(from.rank, slots.partial_of(n, from.row));
  }
  sum_home(op, token, {rows, count});
}

}  // namespace expertwire::ep::cpu
