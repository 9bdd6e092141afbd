#include <algorithm>

#include "ep/cpu/high_throughput/lane.hpp"
#include "ep/cpu/stream_rule.hpp"
#include "ep/cpu/vector_ops.hpp"

namespace expertwire::inline v0::ep::cpu {

// Dispatch to the pool: rows are written to their final places and stay there.

namespace {

constexpr auto kChunkRows = static_cast<std::int64_t>(HighThroughputSlots::kChunkRows);

}  // namespace

// Send half ------------------------------------------------------------------------------------

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

void HighThroughputLane::fill_pools(const Dispatch& op, int worker, Epoch n) {
  const HighThroughputHandle& handle = routing_of(op);
  const Route& route = handle.route;
  const bool stream = passes_caches(index(route.tokens) * handle.format.data_bytes);
  ChunkTally tally(*this, handle, n);
  const Span tokens = part_of(route.tokens, worker, team_.size());
  for (auto t = static_cast<int>(tokens.begin); t < tokens.end; ++t) {
    const Destination* list = route.destinations_of(t);
    for (int i = 0; i < route.width() && list[i].rank >= 0; ++i) {
      const int to = list[i].rank;
      const Run run = handle.run_at(to);
      if (const auto sent = static_cast<std::uint32_t>(list[i].row); run.has_room(sent))
        write_row(op, t, to, pool_place(to, n, run.place(sent), handle.format), stream);
      tally.add(to, list[i].row);
    }
  }
  tally.close_all();
}

// Receive half ---------------------------------------------------------------------------------

void HighThroughputLane::await_pool(const Dispatch& op, int worker, Epoch n,
                                    const WaitContext& context) const {
  const HighThroughputHandle& handle = routing_of(op);
  for_each_peer(memory_.rank(), memory_.size(), [&](int source) {
    if (source == memory_.rank()) return;  // own rows are there when the workers are
    const std::int64_t rows = handle.rows_between(source, memory_.rank());
    for (std::int64_t chunk = worker; chunk * kChunkRows < rows; chunk += team_.size()) {
      const auto* flag = memory_.inbox<Epoch>(source, memory_.slots().row_flag_of(n, chunk));
      wait_until(context, source, Phase::dispatch_rows,
                 static_cast<std::uint64_t>(chunk * kChunkRows),
                 [&] { return arrived<HostAccess>(flag, n); });
    }
  });
}

// Rows of the pool -----------------------------------------------------------------------------

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
          nullptr,
          memory_.there<std::byte>(owner, slots.pool_scales_of(n, row))};
}

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
