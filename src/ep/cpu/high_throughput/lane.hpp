#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <future>
#include <memory>
#include <vector>

#include "comm/wait.hpp"
#include "ep/cpu/lane.hpp"
#include "ep/cpu/rings.hpp"
#include "ep/front/high_throughput_engine.hpp"
#include "ep/protocol/layout.hpp"

namespace expertwire::inline v0::ep::cpu {

/// Routing of one high-throughput dispatch.
struct HighThroughputHandle final : ep::HighThroughputHandle {
  std::vector<std::int32_t> rows;        ///< [R, R] rows from source to destination
  std::vector<std::int64_t> capacity;    ///< [R] rows that each rank's output has room for
  std::vector<std::int64_t> first_at;    ///< [R] this rank's first row at each rank
  std::vector<std::int64_t> first_from;  ///< [R + 1] each source's first row here
  std::vector<std::int32_t> selections_per_expert;  ///< [L]
  std::int32_t came = 0;                            ///< rows that came, or would have
  /// Of a grouped handle, where rows lie in this rank's output.
  std::vector<std::int64_t> first_in;        ///< [R, L] of each source in each group
  std::vector<std::int32_t> expert_offsets;  ///< [L + 1] from the start: callers look at it
  std::vector<std::int32_t> group_offsets;   ///< [L + 1] the same, with what pads groups
  /// [token rows, K] of the selections of each token that came, -1 where there is none or no room.
  std::vector<std::int32_t> places;
  bool too_many = false;                     ///< some rank's pool is too small: nothing was sent
  std::vector<std::int32_t> source_offsets;  ///< as first_from; callers look at it from the start
  std::shared_future<void> counted;          ///< ready when all of the above and the route are
  Epoch epoch = 0;                           ///< of the dispatch; its pool rows lie in that slot
  Epoch root = 0;  ///< of the dispatch whose routing this is, and its lane
  int root_lane = 0;

  /// Takes the routing of a dispatch that may still be on its way on another stream.
  void adopt(const HighThroughputHandle& cached, const WaitContext& context);

  /// Where this rank's rows lie at `rank`, and those of `source` here.
  Run run_at(int rank) const {
    const auto r = static_cast<std::size_t>(rank);
    return TokenMajor{capacity[r]}.run(first_at[r]);
  }
  Run run_from(int source, int self) const {
    return TokenMajor{capacity[static_cast<std::size_t>(self)]}.run(
        first_from[static_cast<std::size_t>(source)]);
  }
  std::int64_t rows_between(int source, int destination) const {
    return rows[static_cast<std::size_t>(source) * first_at.size() +
                static_cast<std::size_t>(destination)];
  }
  /// Where the rows of `source` lie in the group of an expert.
  Run run_in(int source, int local_expert) const {
    const std::size_t local = expert_offsets.size() - 1;
    return Grouped{output_rows}.run(first_in[static_cast<std::size_t>(source) * local +
                                             static_cast<std::size_t>(local_expert)]);
  }
  /// [K] of a token that came: the i-th from `source`.
  std::int32_t* places_of(int source, std::int64_t i) {
    return &places[static_cast<std::size_t>((first_from[static_cast<std::size_t>(source)] + i) *
                                            shape.top_k)];
  }
  /// Says where groups lie; `selections` [R, L] of each local expert from each source.
  void place_groups(const std::vector<std::int32_t>& selections);
  /// Rows that pass between this rank, `self`, and another; what has no room stays at home.
  std::int64_t rows_to(int rank, int self) const {
    return run_at(rank).fitting(static_cast<std::uint32_t>(rows_between(self, rank)));
  }
  std::int64_t rows_from(int source, int self) const {
    return run_from(source, self).fitting(static_cast<std::uint32_t>(rows_between(source, self)));
  }
  /// Of a dispatch; a combine's go the other way.
  RingRows ring_rows(int self) const {
    const auto ranks = static_cast<int>(first_at.size());
    RingRows passing;
    for (int peer = 0; peer < ranks; ++peer) {
      passing.to.push_back(peer == self ? 0 : rows_to(peer, self));
      passing.from.push_back(peer == self ? 0 : rows_from(peer, self));
    }
    return passing;
  }
};

using HighThroughputRings = Rings<HighThroughputSlots>;

/// One lane of the high-throughput mode on the CPU.
///
/// Roles: every worker sends and receives at once, so that it never waits for one ring while
/// another can move: of dispatch it has every W-th token and every W-th row of each source; of
/// combine every W-th row of each source and every W-th token. With a pool it first writes the rows
/// of contiguous tokens, then waits for every W-th chunk. The caller alone exchanges counts and
/// offers.
///
/// Who writes what: a frame and a row of the pool have one writer. A chunk's flag is released by
/// whichever worker of the source adds the chunk's last row, after the others' additions to the
/// same (local) counter.
///
/// Memory order: a frame, release of its flag; acquire, then reads, release of its place. Rows of a
/// pool, store fence (they may be written past the caches), acq_rel addition to the chunk's
/// counter, release of the chunk's flag; acquire of the flag, then reads.
///
/// Cost: dispatch writes each row once, and what came by a ring once more; combine copies nothing
/// when rows lie in the pool, else each row once; every token is summed once.
class HighThroughputLane final : public Lane<HighThroughputSlots, HighThroughputHandle> {
 public:
  HighThroughputLane(Memory memory, const MoeShape& shape, int workers);

  /// First part of a dispatch that has a new route: fills the handle's counts. `capacity` is what
  /// this rank's output takes; if no rank gave one, needing more is an overflow. `options` are
  /// those of a Call.
  void exchange_counts(HighThroughputHandle& handle, std::int64_t capacity, std::int32_t options,
                       const WaitContext& context);
  /// The same of a dispatch that takes the routing of another: ranks tell each other which.
  void exchange_calls(const HighThroughputHandle& handle, std::int32_t options,
                      const WaitContext& context) const;

  using Dispatch = HighThroughputEngine::Dispatch;
  /// Second part: rows. Ends the dispatch's epoch, also when there was an overflow.
  void dispatch(const Dispatch& op, WaitContext context);

  using Combine = HighThroughputEngine::Combine;
  void combine(const Combine& op, WaitContext context);

  /// Gives the rows of a pool dispatch back to the senders.
  void release_pool(Epoch epoch);

  /// The pool rows that the handle's dispatch fills; may be called before it runs.
  HighThroughput::Outputs pool_view(const HighThroughputHandle& handle, std::int64_t rows) const;
  /// Epoch of the n-th dispatch to come, counted from 0.
  Epoch epoch_after(std::uint64_t dispatches) const;

 private:
  /// Where one row goes, with what belongs to it.
  struct RowPlace {
    std::byte* x;
    std::int32_t* token;
    std::int32_t* experts;
    float* weights;
    std::int32_t* positions;  ///< null where they are not asked for
    std::byte* scales;
  };
  class ChunkTally;
  class Sender;
  class Receiver;
  class Pusher;
  class Summer;

  struct PoolRow {
    int owner;
    Epoch epoch;
    std::int64_t row;
  };
  RowPlace pool_place(int owner, Epoch n, std::int64_t row, const RowFormat& format) const;
  RowPlace place_of(const HighThroughputSlots& slots, const PoolRow& at,
                    const RowFormat& format) const;
  static RowPlace place_in(const HighThroughput::Outputs& outputs, std::int64_t row,
                           const RowFormat& format, int top_k);
  RowPlace place_in(std::byte* frame, const HighThroughputHandle& handle) const;
  /// A token that came: the i-th of a source.
  struct Arrived {
    int source;
    std::int64_t i;
  };
  void expand_row(const Dispatch& op, const Arrived& row, const RowPlace& from, bool stream) const;
  void expand_own_row(const Dispatch& op, int token, std::int64_t row, bool stream) const;
  void pad_output(const Dispatch& op, int worker) const;
  void sum_group(const Combine& op, const Arrived& row, std::byte* out) const;
  void weigh_group(const Combine& op, const Arrived& row, float* out) const;
  void write_beside(const Dispatch& op, int token, int to, const RowPlace& place) const;
  void write_row(const Dispatch& op, int token, int to, const RowPlace& place, bool stream) const;
  void fill_pools(const Dispatch& op, int worker, Epoch n);
  void await_pool(const Dispatch& op, int worker, Epoch n, const WaitContext& context) const;
  bool lies_in_pool(const Combine& op) const;
  RingRows rows_home(const HighThroughputHandle& handle, bool pulled, Epoch n) const;
  void send_offers(const Combine& op, Epoch n) const;
  void settle();

  const HighThroughputSlots places_;  // for callers, who do not wait for the lane's turn
  std::unique_ptr<std::atomic<std::int32_t>[]> chunk_rows_;  // [R, chunks] rows written so far
  Epoch first_epoch_;
  struct Reading {
    Epoch epoch;
    bool done;
  };
  std::deque<Reading> readings_;  // dispatches whose credit has not been granted, oldest first
};

}  // namespace expertwire::ep::cpu
