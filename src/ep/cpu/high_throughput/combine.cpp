#include <algorithm>
#include <array>
#include <cstring>

#include "ep/cpu/high_throughput/lane.hpp"
#include "ep/cpu/stream_rule.hpp"
#include "ep/cpu/vector_ops.hpp"

namespace expertwire::inline v0::ep::cpu {

// Offers ---------------------------------------------------------------------------------------

/// Whether peers can read y where it is. Own rows are always read there.
bool HighThroughputLane::lies_in_pool(const Combine& op) const {
  const HighThroughputHandle& handle = routing_of(op);
  return handle.in_pool && op.request.y.data() ==
                               memory_.there<std::byte>(
                                   memory_.rank(), memory_.slots().pool_row_of(handle.epoch, 0, 0));
}

/// Tells every rank where this one's rows will be; also releases rows in the pool, and beside them
/// the weights that go home.
void HighThroughputLane::send_offers(const Combine& op, Epoch n) const {
  const auto& slots = memory_.slots();
  const ConstTensorView& weights = op.request.topk_weights;
  if (lies_in_pool(op) && weights.present())
    std::memmove(
        memory_.there<float>(memory_.rank(), slots.pool_weights_of(routing_of(op).epoch, 0)),
        weights.data(), weights.bytes());
  const CombineOffer offer{lies_in_pool(op) ? 1 : 0, weights.present() ? 1 : 0};
  for_each_peer(memory_.rank(), memory_.size(), [&](int peer) {
    *memory_.outbox<CombineOffer>(peer, slots.offer_of(n)) = offer;
    memory_.announce(peer, slots.combine.flag_of(n), n);
  });
}

// Roles: pusher --------------------------------------------------------------------------------

/// Writes every W-th row of each source to its ring, to whichever ring has room.
class HighThroughputLane::Pusher {
 public:
  Pusher(const HighThroughputLane& lane, const Combine& op, const HighThroughputRings& rings,
         int worker)
      : lane_(lane), op_(op), rings_(rings), served_(rings.rows().to, worker, lane.team_.size()) {
    stream_ = passes_caches(index(handle().came) * lane.shape_.row_bytes());
  }
  bool done() const { return served_.done(); }
  Standing waits_for() const { return served_.waits_for(); }
  bool step() {
    return served_.step(
        self(), [&](int source, std::int64_t row) { return rings_.has_room(source, row); },
        [&](int source, std::int64_t row) { push(source, row); });
  }

 private:
  const HighThroughputHandle& handle() const { return routing_of(op_); }
  int self() const { return lane_.memory_.rank(); }

  void push(int source, std::int64_t row) const {
    std::byte* frame = rings_.frame_to(source, row);
    auto* weights = reinterpret_cast<float*>(frame + lane_.memory_.slots().combined.weights);
    if (handle().grouped) {
      lane_.sum_group(op_, {source, row}, frame);
      if (op_.request.topk_weights.present()) lane_.weigh_group(op_, {source, row}, weights);
    } else {
      copy(handle().run_from(source, self()).place(static_cast<std::uint32_t>(row)), frame,
           weights);
    }
    vector_ops().store_fence();
    rings_.announce(source, row);
  }
  void copy(std::size_t place, std::byte* frame, float* weights) const {
    const std::size_t bytes = lane_.shape_.row_bytes(), top_k = index(lane_.shape_.top_k);
    void* to = frame;
    vector_ops().copy(&to, 1, op_.request.y.as<std::byte>() + place * bytes, bytes, stream_);
    if (op_.request.topk_weights.present())
      std::memcpy(weights, op_.request.topk_weights.as<float>() + place * top_k,
                  top_k * sizeof(float));
  }

  const HighThroughputLane& lane_;
  const Combine& op_;
  const HighThroughputRings& rings_;
  Served served_;
  bool stream_;
};

// Roles: summer --------------------------------------------------------------------------------

/// Sums every W-th token, in ascending order, once all its rows are there.
class HighThroughputLane::Summer {
 public:
  Summer(const HighThroughputLane& lane, const Combine& op, const HighThroughputRings& rings,
         int worker, Epoch n)
      : lane_(lane), op_(op), rings_(rings), token_(worker) {
    stream_ = passes_caches(index(route().tokens) * lane.shape_.row_bytes());
    for (int peer = 0; peer < lane.memory_.size(); ++peer)
      offers_.push_back(*lane.memory_.inbox<CombineOffer>(peer, lane.memory_.slots().offer_of(n)));
  }
  bool done() const { return token_ >= route().tokens; }
  Standing waits_for() const { return {missing_.rank, missing_.row}; }
  bool step() {
    bool moved = false;
    for (; !done() && find_rows(); token_ += lane_.team_.size()) {
      sum();
      moved = true;
    }
    return moved;
  }

 private:
  /// A row of a token that came home, and its weights if they did.
  struct Found {
    Destination from;
    bool framed;
    const std::byte* row;
    const float* weights;
  };
  const HighThroughputHandle& handle() const { return routing_of(op_); }
  const Route& route() const { return handle().route; }

  /// Finds the rows of the token; false if one is not there yet. One past a capacity is none.
  bool find_rows() {
    const Destination* list = route().destinations_of(token_);
    count_ = 0;
    for (int i = 0; i < route().width() && list[i].rank >= 0; ++i) {
      const Run run = handle().run_at(list[i].rank);
      if (!run.has_room(static_cast<std::uint32_t>(list[i].row))) continue;
      missing_ = list[i];
      if (!find(list[i], run.place(static_cast<std::uint32_t>(list[i].row)))) return false;
    }
    return true;
  }
  bool find(const Destination& from, std::uint64_t place) {
    const auto& memory = lane_.memory_;
    const auto& slots = memory.slots();
    const std::size_t bytes = lane_.shape_.row_bytes(), top_k = index(lane_.shape_.top_k);
    const CombineOffer& offer = offers_[index(from.rank)];
    Found found{from, false, nullptr, nullptr};
    if (from.rank == memory.rank() && handle().grouped) {
      // Made when all rows are there.
    } else if (from.rank == memory.rank()) {
      found.row = op_.request.y.as<std::byte>() + place * bytes;
      if (offer.weights != 0) found.weights = op_.request.topk_weights.as<float>() + place * top_k;
    } else if (offer.pull != 0) {
      const auto row = static_cast<std::int64_t>(place);
      found.row = memory.there<std::byte>(from.rank, slots.pool_row_of(handle().epoch, row, bytes));
      if (offer.weights != 0)
        found.weights = memory.there<float>(from.rank, slots.pool_weights_of(handle().epoch, row));
    } else {
      if (!rings_.has_come(from.rank, from.row)) return false;
      found.framed = true;
      found.row = rings_.frame_from(from.rank, from.row);
      if (offer.weights != 0)
        found.weights = reinterpret_cast<const float*>(found.row + slots.combined.weights);
    }
    found_[index(count_++)] = found;
    return true;
  }
  void sum() {
    std::array<const void*, kMostTopK> rows;
    for (int i = 0; i < count_; ++i) {
      if (found_[index(i)].row == nullptr) make_own(&found_[index(i)]);
      rows[index(i)] = found_[index(i)].row;
    }
    if (op_.out_topk_weights.present()) bring_weights();
    lane_.sum_home(op_, token_, {rows.data(), count_, stream_});
    for (int i = 0; i < count_; ++i)
      if (const Found& found = found_[index(i)]; found.framed)
        rings_.give_back(found.from.rank, found.from.row);
  }
  /// What this rank's experts made of the token, where rows are grouped.
  void make_own(Found* found) {
    own_row_.resize(lane_.shape_.row_bytes());
    lane_.sum_group(op_, {found->from.rank, found->from.row}, own_row_.data());
    found->row = own_row_.data();
    if (!op_.request.topk_weights.present()) return;
    lane_.weigh_group(op_, {found->from.rank, found->from.row}, own_weights_.data());
    found->weights = own_weights_.data();
  }
  void bring_weights() {
    const int top_k = route().top_k;
    float* home = op_.out_topk_weights.as<float>() + index(token_) * index(top_k);
    std::fill_n(home, top_k, 0.0F);
    const std::int32_t* experts = route().experts_of(token_);
    for (int i = 0; i < count_; ++i) {
      const Found& found = found_[index(i)];
      for (int k = 0; k < top_k && found.weights != nullptr; ++k)
        if (experts[k] >= 0 && route().placement.rank_of(experts[k]) == found.from.rank)
          home[k] = found.weights[k];
    }
  }

  const HighThroughputLane& lane_;
  const Combine& op_;
  const HighThroughputRings& rings_;
  std::vector<CombineOffer> offers_;
  int token_, count_ = 0;
  std::array<Found, kMostTopK> found_;
  std::vector<std::byte> own_row_;
  std::array<float, kMostTopK> own_weights_;
  Destination missing_{-1, 0};
  bool stream_;
};

// Combine --------------------------------------------------------------------------------------

/// What passes the rings: the rows of the dispatch go home, but for those that are pulled.
RingRows HighThroughputLane::rows_home(const HighThroughputHandle& handle, bool pulled,
                                       Epoch n) const {
  RingRows rows = handle.ring_rows(memory_.rank());
  std::swap(rows.to, rows.from);
  if (pulled) std::fill(rows.to.begin(), rows.to.end(), 0);
  for (int peer = 0; peer < memory_.size(); ++peer)
    if (memory_.inbox<CombineOffer>(peer, memory_.slots().offer_of(n))->pull != 0)
      rows.from[index(peer)] = 0;
  return rows;
}

void HighThroughputLane::combine(const Combine& op, WaitContext context) {
  const auto& slots = memory_.slots();
  const auto lane = memory_.direction(slots.combine);
  const Epoch n = lane.sending();
  const HighThroughputHandle& handle = routing_of(op);
  const int self = memory_.rank();
  for_each_peer(self, memory_.size(),
                [&](int peer) { memory_.await_credit(slots.combine, peer, n, context); });
  memory_.tell_call(slots.combine, n,
                    handle.call(0, RowFormat::of(op.request.y.dtype(), shape_.hidden)),
                    handle.epoch);
  send_offers(op, n);
  memory_.compare_calls(
      slots.combine, n, [](int) { return true; }, context);
  for_each_peer(self, memory_.size(), [&](int peer) {
    const auto* flag = memory_.inbox<Epoch>(peer, slots.combine.flag_of(n));
    wait_until(context, peer, Phase::counts, n, [&] { return arrived<HostAccess>(flag, n); });
  });
  const bool pulled = lies_in_pool(op);
  const HighThroughputRings rings(memory_, slots.ring, rows_home(handle, pulled, n));
  WaitContext team_context = context;
  team_context.abandoned = team_.failed();
  team_.run([&](int worker) {
    Pusher pusher(*this, op, rings, worker);
    Summer summer(*this, op, rings, worker, n);
    run_both(pusher, summer, Phase::combine_rows, team_context);
    vector_ops().store_fence();
    lane.finish_send(n, static_cast<std::uint32_t>(team_.size()));
    lane.finish_receive(n, static_cast<std::uint32_t>(team_.size()));
  });
  rings.advance();
  memory_.grant_all(slots.combine, n);
  if (!handle.in_pool) return;
  // Pool rows may be given back only when every rank has read them.
  for_each_peer(self, memory_.size(), [&](int peer) {
    if (pulled)
      wait_until(context, peer, Phase::release, n, [&] { return lane.has_read(peer, n); });
  });
  release_pool(handle.epoch);
}

}  // namespace expertwire::ep::cpu
