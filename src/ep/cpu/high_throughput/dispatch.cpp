#include <algorithm>
#include <cstring>

#include "ep/cpu/high_throughput/lane.hpp"
#include "ep/cpu/stream_rule.hpp"
#include "ep/cpu/vector_ops.hpp"

namespace expertwire::inline v0::ep::cpu {

// A row, wherever it goes ----------------------------------------------------------------------

HighThroughputLane::RowPlace HighThroughputLane::place_in(const HighThroughput::Outputs& outputs,
                                                          std::int64_t row, const RowFormat& format,
                                                          int top_k) {
  return {outputs.x.as<std::byte>() + index(row) * format.data_bytes,
          outputs.source_tokens.as<std::int32_t>() + row,
          outputs.topk_experts.as<std::int32_t>() + index(row) * index(top_k),
          outputs.topk_weights.as<float>() + index(row) * index(top_k),
          nullptr,
          outputs.scales.as<std::byte>() + index(row) * format.scale_bytes()};
}

/// What a frame holds: a row and what goes beside it.
HighThroughputLane::RowPlace HighThroughputLane::place_in(
    std::byte* frame, const HighThroughputHandle& handle) const {
  const FrameParts& parts = memory_.slots().dispatched;
  return {frame,
          reinterpret_cast<std::int32_t*>(frame + parts.token),
          reinterpret_cast<std::int32_t*>(frame + parts.experts),
          reinterpret_cast<float*>(frame + parts.weights),
          handle.grouped ? reinterpret_cast<std::int32_t*>(frame + parts.positions) : nullptr,
          frame + parts.scales};
}

/// What goes beside a token's row at a rank, but for scales.
void HighThroughputLane::write_beside(const Dispatch& op, int token, int to,
                                      const RowPlace& place) const {
  const Route& route = routing_of(op).route;
  const std::int32_t* experts = route.experts_of(token);
  const float* weights = op.request.topk_weights.present() ? op.request.topk_weights.as<float>() +
                                                                 index(token) * index(route.top_k)
                                                           : nullptr;
  *place.token = token;
  for (int k = 0; k < route.top_k; ++k) {
    const bool here = experts[k] >= 0 && route.placement.rank_of(experts[k]) == to;
    place.experts[k] = here ? route.placement.local_index(experts[k]) : -1;
    place.weights[k] = here && weights != nullptr ? weights[k] : 0.0F;
    if (place.positions != nullptr) place.positions[k] = here ? route.positions_of(token)[k] : -1;
  }
}

void HighThroughputLane::write_row(const Dispatch& op, int token, int to, const RowPlace& place,
                                   bool stream) const {
  const RowFormat& format = routing_of(op).format;
  write_beside(op, token, to, place);
  if (format.scales > 0)
    std::memcpy(place.scales,
                op.request.x_scales.as<std::byte>() + index(token) * format.scale_bytes(),
                format.scale_bytes());
  void* x = place.x;
  vector_ops().copy(&x, 1, op.request.x.as<std::byte>() + index(token) * format.data_bytes,
                    format.data_bytes, stream);
}

// Roles: sender --------------------------------------------------------------------------------

/// Writes every W-th token to the rings of its ranks; own rows go straight to the output.
class HighThroughputLane::Sender {
 public:
  Sender(const HighThroughputLane& lane, const Dispatch& op, const HighThroughputRings& rings,
         int worker)
      : lane_(lane), op_(op), rings_(rings), token_(worker) {
    stream_ = passes_caches(index(route().tokens) * handle().format.data_bytes);
  }
  bool done() const { return token_ >= route().tokens; }
  Standing waits_for() const {
    const Destination& to = route().destinations_of(token_)[next_];
    return {to.rank, to.row};
  }
  bool step() {
    bool moved = false;
    for (; !done(); token_ += lane_.team_.size(), next_ = 0) {
      const Destination* list = route().destinations_of(token_);
      for (; next_ < route().width() && list[next_].rank >= 0; ++next_) {
        if (!send(list[next_])) return moved;
        moved = true;
      }
      moved = true;  // also a token that goes nowhere
    }
    return moved;
  }

 private:
  const HighThroughputHandle& handle() const { return routing_of(op_); }
  const Route& route() const { return handle().route; }

  /// False if there is no room for it now.
  bool send(const Destination& to) const {
    const Run run = handle().run_at(to.rank);
    const auto row = static_cast<std::uint32_t>(to.row);
    if (!run.has_room(row)) return true;
    if (to.rank == lane_.memory_.rank()) {
      if (op_.outputs.x.present()) send_home(to, run.place(row));
      return true;
    }
    if (!rings_.has_room(to.rank, to.row)) return false;
    lane_.write_row(op_, token_, to.rank,
                    lane_.place_in(rings_.frame_to(to.rank, to.row), handle()), stream_);
    vector_ops().store_fence();
    rings_.announce(to.rank, to.row);
    return true;
  }
  void send_home(const Destination& to, std::uint32_t place) const {
    if (handle().grouped)
      lane_.expand_own_row(op_, token_, to.row, stream_);
    else
      lane_.write_row(op_, token_, to.rank,
                      place_in(op_.outputs, place, handle().format, lane_.shape_.top_k), stream_);
  }

  const HighThroughputLane& lane_;
  const Dispatch& op_;
  const HighThroughputRings& rings_;
  int token_, next_ = 0;  // the next row is that of a token's destination
  bool stream_;
};

// Roles: receiver ------------------------------------------------------------------------------

/// Takes every W-th row of each source out of its ring, from whichever ring has some.
class HighThroughputLane::Receiver {
 public:
  Receiver(const HighThroughputLane& lane, const Dispatch& op, const HighThroughputRings& rings,
           int worker)
      : lane_(lane), op_(op), rings_(rings), served_(rings.rows().from, worker, lane.team_.size()) {
    stream_ = passes_caches(index(handle().came) * handle().format.data_bytes);
  }
  bool done() const { return served_.done(); }
  Standing waits_for() const { return served_.waits_for(); }
  bool step() {
    return served_.step(
        self(), [&](int source, std::int64_t row) { return rings_.has_come(source, row); },
        [&](int source, std::int64_t row) { take(source, row); });
  }

 private:
  const HighThroughputHandle& handle() const { return routing_of(op_); }
  int self() const { return lane_.memory_.rank(); }

  /// Without outputs (an allocator gave none) rows are only let through.
  void take(int source, std::int64_t row) const {
    const RowPlace from =
        lane_.place_in(const_cast<std::byte*>(rings_.frame_from(source, row)), handle());
    if (op_.outputs.x.present() && handle().grouped)
      lane_.expand_row(op_, {source, row}, from, stream_);
    else if (op_.outputs.x.present())
      copy(source, row, from);
    rings_.give_back(source, row);
  }
  void copy(int source, std::int64_t row, const RowPlace& from) const {
    const RowFormat& format = handle().format;
    const Run run = handle().run_from(source, self());
    const RowPlace to = place_in(op_.outputs, run.place(static_cast<std::uint32_t>(row)), format,
                                 lane_.shape_.top_k);
    const std::size_t selections = index(lane_.shape_.top_k);
    void* x = to.x;
    vector_ops().copy(&x, 1, from.x, format.data_bytes, stream_);
    *to.token = *from.token;
    std::memcpy(to.experts, from.experts, selections * sizeof(std::int32_t));
    std::memcpy(to.weights, from.weights, selections * sizeof(float));
    if (format.scales > 0) std::memcpy(to.scales, from.scales, format.scale_bytes());
  }

  const HighThroughputLane& lane_;
  const Dispatch& op_;
  const HighThroughputRings& rings_;
  Served served_;
  bool stream_;
};

// Dispatch -------------------------------------------------------------------------------------

void HighThroughputLane::dispatch(const Dispatch& op, WaitContext context) {
  const auto& slots = memory_.slots();
  const auto lane = memory_.direction(slots.dispatch);
  const Epoch n = lane.sending();
  const HighThroughputHandle& handle = routing_of(op);
  const int self = memory_.rank();
  const bool cached = op.cached != nullptr;  // else they have been compared with the counts
  memory_.compare_calls(
      slots.dispatch, n, [&](int peer) { return cached && handle.rows_between(peer, self) > 0; },
      context);
  const bool sends = !handle.too_many, pool = handle.in_pool && sends;
  const bool owned = !handle.in_pool && sends;
  const HighThroughputRings rings(memory_, slots.ring, owned ? handle.ring_rows(self) : RingRows{});
  const bool grouped = handle.grouped && owned && op.outputs.x.present();
  if (grouped) routing_of(op).places.resize(index(handle.first_from.back() * shape_.top_k));
  context.abandoned = team_.failed();
  team_.run([&](int worker) {
    if (owned) {
      Sender sender(*this, op, rings, worker);
      Receiver receiver(*this, op, rings, worker);
      run_both(sender, receiver, Phase::dispatch_rows, context);
      pad_output(op, worker);
    } else if (pool) {
      fill_pools(op, worker, n);
      await_pool(op, worker, n, context);
    }
    vector_ops().store_fence();
    lane.finish_send(n, static_cast<std::uint32_t>(team_.size()));
    lane.finish_receive(n, static_cast<std::uint32_t>(team_.size()));
  });
  if (owned) rings.advance();
  readings_.push_back({n, !pool});
  settle();
}

}  // namespace expertwire::ep::cpu
