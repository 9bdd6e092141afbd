#include <algorithm>
#include <cstring>

#include "ep/cpu/high_throughput/lane.hpp"
#include "ep/cpu/stream_rule.hpp"
#include "ep/cpu/vector_ops.hpp"

namespace expertwire::inline v0::ep::cpu {

namespace {

constexpr auto kChunkRows = static_cast<std::int64_t>(HighThroughputSlots::kChunkRows);

}  // namespace

// Send half ------------------------------------------------------------------------------------

void HighThroughputLane::send_combine(const Combine& op, WaitContext context) {
  const auto& slots = memory_.slots();
  const auto lane = memory_.direction(slots.combine);
  const Epoch n = lane.sending();
  for_each_peer(memory_.rank(), memory_.size(),
                [&](int peer) { memory_.await_credit(slots.combine, peer, n, context); });
  memory_.tell_call(slots.combine, n,
                    routing_of(op).call(0, RowFormat::of(op.request.y.dtype(), shape_.hidden)),
                    routing_of(op).epoch);
  if (op.request.topk_weights.present()) send_weights(op, n);
  send_offers(op, n);
  const bool push = !lies_in_pool(op);
  context.abandoned = team_.failed();
  team_.run([&](int worker) {
    if (push) push_rows(op, worker, n);
    lane.finish_send(n, static_cast<std::uint32_t>(team_.size()));
  });
}

/// Whether peers can read y where it is. Own rows are always read there.
bool HighThroughputLane::lies_in_pool(const Combine& op) const {
  const HighThroughputHandle& handle = routing_of(op);
  return handle.in_pool && op.request.y.data() ==
                               memory_.there<std::byte>(
                                   memory_.rank(), memory_.slots().pool_row_of(handle.epoch, 0, 0));
}

/// Tells every rank where this one's rows will be; also releases rows in the pool and weights.
void HighThroughputLane::send_offers(const Combine& op, Epoch n) const {
  const auto& slots = memory_.slots();
  const CombineOffer offer{lies_in_pool(op) ? 1 : 0, op.request.topk_weights.present() ? 1 : 0};
  for_each_peer(memory_.rank(), memory_.size(), [&](int peer) {
    *memory_.outbox<CombineOffer>(peer, slots.offer_of(n)) = offer;
    memory_.announce(peer, slots.offer_flag_of(n), n);
  });
}

void HighThroughputLane::send_weights(const Combine& op, Epoch n) const {
  const HighThroughputHandle& handle = routing_of(op);
  const std::size_t row_bytes = index(shape_.top_k) * sizeof(float);
  for_each_peer(memory_.rank(), memory_.size(), [&](int source) {
    const Run run = handle.run_from(source, memory_.rank());
    const std::uint32_t rows =
        run.fitting(static_cast<std::uint32_t>(handle.rows_between(source, memory_.rank())));
    if (rows == 0) return;
    std::memcpy(memory_.outbox<float>(source, memory_.slots().partial_weights_of(n, 0)),
                op.request.topk_weights.as<std::byte>() + run.first * row_bytes, rows * row_bytes);
  });
}

void HighThroughputLane::push_rows(const Combine& op, int worker, Epoch n) const {
  const auto& slots = memory_.slots();
  const HighThroughputHandle& handle = routing_of(op);
  const bool stream = passes_caches(index(handle.came) * shape_.row_bytes());
  for_each_peer(memory_.rank(), memory_.size(), [&](int source) {
    if (source == memory_.rank()) return;
    const Run run = handle.run_from(source, memory_.rank());
    const std::int64_t rows = handle.rows_between(source, memory_.rank());
    for (std::int64_t chunk = worker; chunk * kChunkRows < rows; chunk += team_.size()) {
      const std::int64_t begin = chunk * kChunkRows;
      const std::int64_t end =
          run.fitting(static_cast<std::uint32_t>(std::min(rows, begin + kChunkRows)));
      void* to = memory_.outbox<std::byte>(source, slots.partial_of(n, begin));
      if (begin < end)
        vector_ops().copy(
            &to, 1, op.request.y.as<std::byte>() + index(run.first + begin) * shape_.row_bytes(),
            index(end - begin) * shape_.row_bytes(), stream);
      vector_ops().store_fence();
      memory_.announce(source, slots.partial_flag_of(n, chunk), n);
    }
  });
}

// Receive half ---------------------------------------------------------------------------------

void HighThroughputLane::receive_combine(const Combine& op, WaitContext context) {
  const auto& slots = memory_.slots();
  const auto lane = memory_.direction(slots.combine);
  const Epoch n = lane.receiving();
  memory_.compare_calls(
      slots.combine, n, [](int) { return true; }, context);
  for_each_peer(memory_.rank(), memory_.size(), [&](int peer) {
    const auto* flag = memory_.inbox<Epoch>(peer, slots.offer_flag_of(n));
    wait_until(context, peer, Phase::counts, n, [&] { return arrived<HostAccess>(flag, n); });
  });
  const bool pulled = lies_in_pool(op);
  WaitContext team_context = context;
  team_context.abandoned = team_.failed();
  team_.run([&](int worker) {
    sum_tokens(op, worker, n, team_context);
    vector_ops().store_fence();
    lane.finish_receive(n, static_cast<std::uint32_t>(team_.size()));
  });
  memory_.grant_all(slots.combine, n);
  if (!routing_of(op).in_pool) return;
  // Pool rows may be given back only when every rank has read them.
  for_each_peer(memory_.rank(), memory_.size(), [&](int peer) {
    if (pulled)
      wait_until(context, peer, Phase::release, n, [&] { return lane.has_read(peer, n); });
  });
  release_pool(routing_of(op).epoch);
}

void HighThroughputLane::sum_tokens(const Combine& op, int worker, Epoch n,
                                    const WaitContext& context) const {
  const auto& slots = memory_.slots();
  const HighThroughputHandle& handle = routing_of(op);
  const Route& route = handle.route;
  const int self = memory_.rank();
  const bool stream = passes_caches(index(route.tokens) * shape_.row_bytes());
  // What each rank offered, and the chunk of it that is known to be there.
  std::vector<CombineOffer> offers(index(memory_.size()));
  std::vector<std::int64_t> there(index(memory_.size()), -1);
  for (int peer = 0; peer < memory_.size(); ++peer)
    offers[index(peer)] = *memory_.inbox<CombineOffer>(peer, slots.offer_of(n));

  // The row of this rank's `row` at `from`; null if it lies past the capacity there.
  auto find_row = [&](const Destination& from) -> const void* {
    const Run run = handle.run_at(from.rank);
    if (!run.has_room(static_cast<std::uint32_t>(from.row))) return nullptr;
    const std::int64_t row = run.place(static_cast<std::uint32_t>(from.row));
    if (from.rank == self) return op.request.y.as<std::byte>() + index(row) * shape_.row_bytes();
    if (offers[index(from.rank)].pull != 0)
      return memory_.there<std::byte>(from.rank,
                                      slots.pool_row_of(handle.epoch, row, shape_.row_bytes()));
    const std::int64_t chunk = from.row / kChunkRows;
    if (there[index(from.rank)] != chunk) {
      const auto* flag = memory_.inbox<Epoch>(from.rank, slots.partial_flag_of(n, chunk));
      wait_until(context, from.rank, Phase::combine_rows, static_cast<std::uint64_t>(from.row),
                 [&] { return arrived<HostAccess>(flag, n); });
      there[index(from.rank)] = chunk;
    }
    return memory_.inbox<std::byte>(from.rank, slots.partial_of(n, from.row));
  };

  const Span tokens = part_of(route.tokens, worker, team_.size());
  for (auto t = static_cast<int>(tokens.begin); t < tokens.end; ++t) {
    const Destination* list = route.destinations_of(t);
    const void* rows[kMostTopK];
    int count = 0;
    float* home = op.out_topk_weights.present()
                      ? op.out_topk_weights.as<float>() + index(t) * index(route.top_k)
                      : nullptr;
    if (home != nullptr) std::fill_n(home, route.top_k, 0.0F);
    for (int i = 0; i < route.width() && list[i].rank >= 0; ++i) {
      const void* row = find_row(list[i]);
      if (row == nullptr) continue;
      rows[count++] = row;
      if (home == nullptr || offers[index(list[i].rank)].weights == 0) continue;
      const auto* weights =
          memory_.inbox<float>(list[i].rank, slots.partial_weights_of(n, list[i].row));
      for (int k = 0; k < route.top_k; ++k)
        if (route.experts_of(t)[k] >= 0 &&
            route.placement.rank_of(route.experts_of(t)[k]) == list[i].rank)
          home[k] = weights[k];
    }
    sum_home(op, t, {rows, count, stream});
  }
}

}  // namespace expertwire::ep::cpu
