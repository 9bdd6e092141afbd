#pragma once

#include <cstdint>
#include <vector>

#include "comm/wait.hpp"
#include "ep/cpu/lane.hpp"
#include "ep/front/low_latency_engine.hpp"
#include "ep/protocol/layout.hpp"
#include "ep/protocol/slots.hpp"

namespace expertwire::inline v0::ep::cpu {

/// Routing of one low-latency dispatch: where this rank's tokens went (Route), and what came.
struct LowLatencyHandle final : ep::LowLatencyHandle {
  std::vector<std::int32_t> rows_from;   ///< [R] rows that each source sent here
  std::vector<std::int64_t> first_from;  ///< [R + 1] index of each source's first row
  /// For every row that came, in order of source and row, K entries: where its copies lie in the
  /// output [L * R*M], or one of the marks; and the weights that came with it.
  std::vector<std::int64_t> copies;
  std::vector<float> weights;
  static constexpr std::int64_t kEnd = -1, kDropped = -2;
  std::int64_t dropped_rows = 0;  ///< rows that found no room, because experts were repeated
  Epoch epoch = 0;                ///< of the dispatch
};

/// One lane of the low-latency mode on the CPU.
///
/// Roles: each half runs on all workers of the team. A worker of a send half owns contiguous
/// tokens (dispatch) or every W-th row (combine); a worker of a receive half owns every W-th row
/// (dispatch) or contiguous tokens (combine). Worker 0 sends the counts.
///
/// Who writes what: a pair is written by its source alone, outputs by the
/// worker that owns the row or token.
///
/// Memory order: row data, then release of the row's flag; acquire of the flag, then reads; after
/// the last read of the half (the end of Team::run) the credit is released to every rank. See
/// ep/protocol/lane.hpp.
///
/// Cost: dispatch T * (distinct ranks) rows over the wire and T * K rows written by receivers;
/// combine the same number of rows back.
class LowLatencyLane final : public Lane<LowLatencySlots, LowLatencyHandle> {
 public:
  using Lane::Lane;

  using Dispatch = LowLatencyDispatch;  ///< its handle has its route
  void send_dispatch(const Dispatch& op, WaitContext context);
  void receive_dispatch(const Dispatch& op, WaitContext context);

  using Combine = LowLatencyCombine;
  void send_combine(const Combine& op, WaitContext context);
  void receive_combine(const Combine& op, WaitContext context);

 private:
  /// A row as it travels: scales behind data, or apart where the caller has them apart.
  struct Payload {
    const std::byte* data;
    const std::byte* scales;
  };
  void send_counts(const Dispatch& op, Epoch n, const WaitContext& context);
  Payload payload_of(const Dispatch& op, int token) const;
  Payload cast_row(const Dispatch& op, int token, std::byte* packed) const;
  void send_row(const Dispatch& op, int token, const Payload& payload, const Destination& to,
                Epoch n) const;
  void await_counts(const Dispatch& op, Epoch n, const WaitContext& context);
  void take_counts(const Dispatch& op, int source, Epoch n, const WaitContext& context);
  void expand_row(const Dispatch& op, int source, std::int32_t row, Epoch n) const;
  void send_weights(const Combine& op, Epoch n) const;
  bool weights_come(const Combine& op, Epoch n, const WaitContext& context) const;
  void sum_partial(const Combine& op, const Destination& of, Epoch n, bool weighted,
                   std::byte* out) const;
  void sum_token(const Combine& op, int token, Epoch n, std::byte* own_partial,
                 const WaitContext& context) const;
};

}  // namespace expertwire::ep::cpu
