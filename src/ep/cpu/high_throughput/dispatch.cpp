#include <algorithm>
#include <cstring>

#include "base/check.hpp"
#include "ep/cpu/high_throughput/lane.hpp"
#include "ep/cpu/stream_rule.hpp"
#include "ep/cpu/vector_ops.hpp"

namespace expertwire::inline v0::ep::cpu {

namespace {

constexpr auto kChunkRows = static_cast<std::int64_t>(HighThroughputSlots::kChunkRows);

}  // namespace

HighThroughputLane::HighThroughputLane(Memory memory, const MoeShape& shape, int workers)
    : Lane(std::move(memory), shape, workers), places_(memory_.slots()) {
  const std::size_t chunks = index(memory_.size()) * memory_.slots().chunks();
  chunk_rows_ = std::make_unique<std::atomic<std::int32_t>[]>(chunks);
  first_epoch_ = memory_.direction(memory_.slots().dispatch).sending();
}

Epoch HighThroughputLane::epoch_after(std::uint64_t dispatches) const {
  return first_epoch_ + static_cast<Epoch>(dispatches);
}

void HighThroughputHandle::adopt(const HighThroughputHandle& cached, const WaitContext& context) {
  if (cached.counted.wait_for(context.deadline.remaining()) != std::future_status::ready)
    throw Error(ErrorCode::timeout,
                fmt::format("{} waited {} ms for the dispatch whose routing it takes",
                            context.operation, context.deadline.budget().count()),
                {context.communicator->rank(), -1, Phase::counts});
  cached.counted.get();
  route = cached.route;
  rows = cached.rows;
  capacity = cached.capacity;
  first_at = cached.first_at;
  first_from = cached.first_from;
  selections_per_expert = cached.selections_per_expert;
  root = cached.root;
  root_lane = cached.root_lane;
  came = cached.came;
}

// Counts ---------------------------------------------------------------------------------------

void HighThroughputLane::exchange_counts(HighThroughputHandle& handle, std::int64_t capacity,
                                         bool strict, const WaitContext& context) {
  const auto& slots = memory_.slots();
  const Epoch n = memory_.direction(slots.dispatch).sending();
  const Route& route = handle.route;
  const int size = memory_.size(), local = route.placement.local_experts();
  const Call call = handle.call(strict ? 0 : Call::kCapacity, handle.format);
  handle.root = n;
  handle.root_lane = handle.lane;
  for_each_peer(memory_.rank(), size, [&](int peer) {
    memory_.await_credit(slots.dispatch, peer, n, context);
    memory_.tell_call(slots.dispatch, peer, n, call, n);
    const std::uint64_t counts = slots.counts_of(n);
    memory_.tell(peer, counts, slots.kCapacity, {static_cast<std::int32_t>(capacity), n});
    for (int to = 0; to < size; ++to)
      memory_.tell(peer, counts, slots.kHeader + to, {route.rows_to_rank[index(to)], n});
    for (int e = 0; e < local; ++e)
      memory_.tell(peer, counts, slots.kHeader + size + e,
                   {route.rows_to_expert[index(peer * local + e)], n});
  });

  handle.rows.assign(index(size) * index(size), 0);
  handle.capacity.assign(index(size), 0);
  handle.first_at.assign(index(size), 0);
  handle.first_from.assign(index(size) + 1, 0);
  handle.selections_per_expert.assign(index(local), 0);
  std::vector<std::int64_t> needed(index(size), 0);
  for (int source = 0; source < size; ++source) {
    const auto* counts = memory_.inbox<Tagged>(source, slots.counts_of(n));
    auto count = [&](int i) { return memory_.await_count(counts + i, source, n, context); };
    memory_.compare_call(slots.dispatch, source, n, context);
    handle.capacity[index(source)] = count(slots.kCapacity);
    for (int to = 0; to < size; ++to) {
      const std::int32_t rows = count(slots.kHeader + to);
      handle.rows[index(source) * index(size) + index(to)] = rows;
      if (source < memory_.rank()) handle.first_at[index(to)] += rows;
      needed[index(to)] += rows;
    }
    handle.first_from[index(source) + 1] =
        handle.first_from[index(source)] + handle.rows_between(source, memory_.rank());
    for (int e = 0; e < local; ++e)
      handle.selections_per_expert[index(e)] += count(slots.kHeader + size + e);
  }
  handle.came = static_cast<std::int32_t>(handle.first_from.back());
  for (int to = 0; strict && to < size; ++to)
    handle.too_many = handle.too_many || needed[index(to)] > handle.capacity[index(to)];
}

void HighThroughputLane::exchange_calls(const HighThroughputHandle& handle,
                                        const WaitContext& context) const {
  const DirectionSlots& place = memory_.slots().dispatch;
  const Epoch n = memory_.direction(place).sending();
  Call call = handle.call(Call::kCached, handle.format);
  call.lane = handle.root_lane;
  for_each_peer(memory_.rank(), memory_.size(), [&](int peer) {
    memory_.await_credit(place, peer, n, context);
    memory_.tell_call(place, peer, n, call, handle.root);
  });
}

// Rows, send half ------------------------------------------------------------------------------

/// Counts the rows that a worker has written to each chunk, and announces a chunk when its last row
/// is there. A worker's rows for one rank are contiguous, so it remembers one chunk a rank.
class HighThroughputLane::ChunkTally {
 public:
  ChunkTally(HighThroughputLane& lane, const HighThroughputHandle& handle, Epoch n)
      : lane_(lane), handle_(handle), n_(n), open_(index(lane.memory_.size())) {}

  void add(int rank, std::int64_t row) {
    Open& open = open_[index(rank)];
    if (open.rows > 0 && open.chunk != row / kChunkRows) close(rank);
    open.chunk = row / kChunkRows;
    ++open.rows;
  }
  void close_all() {
    for (int rank = 0; rank < lane_.memory_.size(); ++rank)
      if (open_[index(rank)].rows > 0) close(rank);
  }

 private:
  struct Open {
    std::int64_t chunk = 0;
    std::int32_t rows = 0;
  };

  void close(int rank) {
    Open& open = open_[index(rank)];
    const auto& memory = lane_.memory_;
    const std::int64_t rows = handle_.rows_between(memory.rank(), rank);
    const std::int64_t whole = std::min(kChunkRows, rows - open.chunk * kChunkRows);
    std::atomic<std::int32_t>& written =
        lane_.chunk_rows_[index(rank) * memory.slots().chunks() + index(open.chunk)];
    vector_ops().store_fence();
    if (written.fetch_add(open.rows, std::memory_order_acq_rel) + open.rows == whole) {
      written.store(0, std::memory_order_relaxed);
      memory.announce(rank, memory.slots().row_flag_of(n_, open.chunk), n_);
    }
    open.rows = 0;
  }

  HighThroughputLane& lane_;
  const HighThroughputHandle& handle_;
  Epoch n_;
  std::vector<Open> open_;
};

void HighThroughputLane::send_rows(const Dispatch& op) {
  const auto& slots = memory_.slots();
  const auto lane = memory_.direction(slots.dispatch);
  const Epoch n = lane.sending();
  const HighThroughputHandle& handle = routing_of(op);
  const Route& route = handle.route;
  const bool stream = passes_caches(index(route.tokens) * handle.format.data_bytes);
  const bool direct = op.outputs.x.present();  // own rows skip the pool
  team_.run([&](int worker) {
    ChunkTally tally(*this, handle, n);
    const Span tokens = part_of(handle.too_many ? 0 : route.tokens, worker, team_.size());
    for (auto t = static_cast<int>(tokens.begin); t < tokens.end; ++t) {
      const Destination* list = route.destinations_of(t);
      for (int i = 0; i < route.width() && list[i].rank >= 0; ++i) {
        const int to = list[i].rank;
        const Run run = handle.run_at(to);
        if (const auto sent = static_cast<std::uint32_t>(list[i].row); run.has_room(sent)) {
          const std::int64_t row = run.place(sent);
          const RowPlace place = direct && to == memory_.rank()
                                     ? place_in(op.outputs, row, handle.format, shape_.top_k)
                                     : pool_place(to, n, row, handle.format);
          send_row(op, t, to, place, stream);
        }
        tally.add(to, list[i].row);
      }
    }
    tally.close_all();
    lane.finish_send(n, static_cast<std::uint32_t>(team_.size()));
  });
}

HighThroughputLane::RowPlace HighThroughputLane::pool_place(int owner, Epoch n, std::int64_t row,
                                                            const RowFormat& format) const {
  return place_of(memory_.slots(), {owner, n, row}, format);
}

HighThroughputLane::RowPlace HighThroughputLane::place_of(const HighThroughputSlots& slots,
                                                          const PoolRow& at,
                                                          const RowFormat& format) const {
  const auto& [owner, n, row] = at;
  return {memory_.there<std::byte>(owner, slots.pool_row_of(n, row, format.data_bytes)),
          memory_.there<std::int32_t>(owner, slots.pool_token_of(n, row)),
          memory_.there<std::int32_t>(owner, slots.pool_experts_of(n, row)),
          memory_.there<float>(owner, slots.pool_weights_of(n, row)),
          memory_.there<std::byte>(owner, slots.pool_scales_of(n, row))};
}

HighThroughputLane::RowPlace HighThroughputLane::place_in(const HighThroughput::Outputs& outputs,
                                                          std::int64_t row, const RowFormat& format,
                                                          int top_k) {
  return {outputs.x.as<std::byte>() + index(row) * format.data_bytes,
          outputs.source_tokens.as<std::int32_t>() + row,
          outputs.topk_experts.as<std::int32_t>() + index(row) * index(top_k),
          outputs.topk_weights.as<float>() + index(row) * index(top_k),
          outputs.scales.as<std::byte>() + index(row) * format.scale_bytes()};
}

void HighThroughputLane::send_row(const Dispatch& op, int token, int to, const RowPlace& place,
                                  bool stream) const {
  const Route& route = routing_of(op).route;
  const RowFormat& format = routing_of(op).format;
  const std::int32_t* experts = route.experts_of(token);
  const float* weights = op.request.topk_weights.present() ? op.request.topk_weights.as<float>() +
                                                                 index(token) * index(route.top_k)
                                                           : nullptr;
  *place.token = token;
  for (int k = 0; k < route.top_k; ++k) {
    const bool here = experts[k] >= 0 && route.placement.rank_of(experts[k]) == to;
    place.experts[k] = here ? route.placement.local_index(experts[k]) : -1;
    place.weights[k] = here && weights != nullptr ? weights[k] : 0.0F;
  }
  if (format.scales > 0)
    std::memcpy(place.scales,
                op.request.x_scales.as<std::byte>() + index(token) * format.scale_bytes(),
                format.scale_bytes());
  void* x = place.x;
  vector_ops().copy(&x, 1, op.request.x.as<std::byte>() + index(token) * format.data_bytes,
                    format.data_bytes, stream);
}

// Rows, receive half ---------------------------------------------------------------------------

void HighThroughputLane::receive_rows(const Dispatch& op, WaitContext context) {
  const auto& slots = memory_.slots();
  const auto lane = memory_.direction(slots.dispatch);
  const Epoch n = lane.receiving();
  const HighThroughputHandle& handle = routing_of(op);
  const bool cached = op.cached != nullptr;  // else they have been compared with the counts
  memory_.compare_calls(
      slots.dispatch, n,
      [&](int peer) { return cached && handle.rows_between(peer, memory_.rank()) > 0; }, context);
  const bool copy = op.outputs.x.present();
  const bool stream = passes_caches(index(handle.came) * handle.format.data_bytes);
  context.abandoned = team_.failed();
  team_.run([&](int worker) {
    for_each_peer(memory_.rank(), memory_.size(), [&](int source) {
      if (source == memory_.rank() || handle.too_many) return;  // own rows are there already
      const std::int64_t rows = handle.rows_between(source, memory_.rank());
      const Run run = handle.run_from(source, memory_.rank());
      for (std::int64_t chunk = worker; chunk * kChunkRows < rows; chunk += team_.size()) {
        const auto* flag = memory_.inbox<Epoch>(source, slots.row_flag_of(n, chunk));
        wait_until(context, source, Phase::dispatch_rows,
                   static_cast<std::uint64_t>(chunk * kChunkRows),
                   [&] { return arrived<HostAccess>(flag, n); });
        const std::int64_t end =
            run.fitting(static_cast<std::uint32_t>(std::min(rows, (chunk + 1) * kChunkRows)));
        if (copy) copy_rows(op, n, run.first + chunk * kChunkRows, run.first + end, stream);
      }
    });
    vector_ops().store_fence();
    lane.finish_receive(n, static_cast<std::uint32_t>(team_.size()));
  });
  const bool keep = routing_of(op).in_pool && !handle.too_many;
  readings_.push_back({n, !keep});
  settle();
}

/// Copies rows [begin, end) from the pool to the caller's outputs.
void HighThroughputLane::copy_rows(const Dispatch& op, Epoch n, std::int64_t begin,
                                   std::int64_t end, bool stream) const {
  if (begin >= end) return;
  const RowFormat& format = routing_of(op).format;
  const RowPlace from = pool_place(memory_.rank(), n, begin, format);
  const RowPlace to = place_in(op.outputs, begin, format, shape_.top_k);
  const std::size_t rows = index(end - begin), selections = rows * index(shape_.top_k);
  void* x = to.x;
  vector_ops().copy(&x, 1, from.x, rows * format.data_bytes, stream);
  std::memcpy(to.token, from.token, rows * sizeof(std::int32_t));
  std::memcpy(to.experts, from.experts, selections * sizeof(std::int32_t));
  std::memcpy(to.weights, from.weights, selections * sizeof(float));
  if (format.scales > 0) std::memcpy(to.scales, from.scales, rows * format.scale_bytes());
}

// Pool -----------------------------------------------------------------------------------------

HighThroughput::Outputs HighThroughputLane::pool_view(const HighThroughputHandle& handle,
                                                      std::int64_t rows) const {
  const RowFormat& format = handle.format;
  const MoeShape& shape = handle.shape;
  const RowPlace place = place_of(places_, {memory_.rank(), handle.epoch, 0}, format);
  return {{place.x, format.dtype, {rows, shape.hidden}},
          {place.token, DType::int32, {rows}},
          {place.experts, DType::int32, {rows, shape.top_k}},
          {place.weights, DType::fp32, {rows, shape.top_k}},
          format.scales > 0 ? TensorView(place.scales, format.scale_dtype(), {rows, format.scales})
                            : TensorView()};
}

void HighThroughputLane::release_pool(Epoch epoch) {
  for (Reading& reading : readings_)
    if (reading.epoch == epoch) reading.done = true;
  settle();
}

/// Grants credit for what has been read. A credit covers all epochs up to it, so a later epoch
/// waits for an earlier one that is still held.
void HighThroughputLane::settle() {
  while (!readings_.empty() && readings_.front().done) {
    memory_.grant_all(memory_.slots().dispatch, readings_.front().epoch);
    readings_.pop_front();
  }
}

}  // namespace expertwire::ep::cpu
