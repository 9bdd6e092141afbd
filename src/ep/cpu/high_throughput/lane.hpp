#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <future>
#include <memory>
#include <vector>

#include "comm/wait.hpp"
#include "ep/cpu/lane.hpp"
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
  bool too_many = false;             ///< some rank's pool is too small: nothing was sent
  std::shared_future<void> counted;  ///< ready when all of the above and the route are
  Epoch epoch = 0;                   ///< of the dispatch; its pool rows lie in that slot
  Epoch root = 0;                    ///< of the dispatch whose routing this is, and its lane
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
};

/// One lane of the high-throughput mode on the CPU.
///
/// Roles: a worker of a send half owns contiguous tokens (dispatch) or every W-th chunk of rows
/// (combine); a worker of a receive half owns every W-th chunk (dispatch) or contiguous tokens
/// (combine). Worker 0 alone exchanges counts and offers.
///
/// Who writes what: a row of the pool has one writer, the source whose range it lies in; so has
/// every slot region. A chunk's flag is released by whichever worker of the source adds the chunk's
/// last row, after the others' additions to the same (local) counter.
///
/// Memory order: rows, store fence (rows may be written past the caches), acq_rel addition to the
/// chunk's counter, release of the chunk's flag; acquire of the flag, then reads.
///
/// Cost: dispatch writes each row once (owned: twice); combine copies nothing when rows lie in the
/// pool, else each row once; every token is summed once.
class HighThroughputLane final : public Lane<HighThroughputSlots, HighThroughputHandle> {
 public:
  HighThroughputLane(Memory memory, const MoeShape& shape, int workers);

  /// First part of a dispatch that has a new route: fills the handle's counts. `capacity` is what
  /// this rank's output takes; with `strict`, on all ranks or none, needing more is an overflow.
  void exchange_counts(HighThroughputHandle& handle, std::int64_t capacity, bool strict,
                       const WaitContext& context);
  /// The same of a dispatch that takes the routing of another: ranks tell each other which.
  void exchange_calls(const HighThroughputHandle& handle, const WaitContext& context) const;

  using Dispatch = HighThroughputEngine::Dispatch;
  /// Second part: rows. Ends the dispatch's epoch, also when there was an overflow.
  void send_rows(const Dispatch& op);
  void receive_rows(const Dispatch& op, WaitContext context);

  using Combine = HighThroughputEngine::Combine;
  void send_combine(const Combine& op, WaitContext context);
  void receive_combine(const Combine& op, WaitContext context);

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
    std::byte* scales;
  };
  class ChunkTally;

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
  void send_row(const Dispatch& op, int token, int to, const RowPlace& place, bool stream) const;
  void copy_rows(const Dispatch& op, Epoch n, std::int64_t begin, std::int64_t end,
                 bool stream) const;
  bool lies_in_pool(const Combine& op) const;
  void send_offers(const Combine& op, Epoch n) const;
  void send_weights(const Combine& op, Epoch n) const;
  void push_rows(const Combine& op, int worker, Epoch n) const;
  void sum_tokens(const Combine& op, int worker, Epoch n, const WaitContext& context) const;
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
