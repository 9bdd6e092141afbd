#pragma once

#include <cstdint>
#include <string>

#include "expertwire/high_throughput.hpp"
#include "expertwire/low_latency.hpp"
#include "reference/oracle.hpp"

namespace expertwire::reference {

/// How many values were compared, and how many were wrong.
struct Report {
  std::int64_t checked = 0;
  std::int64_t wrong = 0;
  std::string first_wrong;  ///< which value, what it was and what it must be

  Report& operator+=(const Report& other);
};

/// How a round trip uses the API.
struct RoundTripOptions {
  enum class Weights { none, dispatch, combine };
  Weights weights = Weights::dispatch;  ///< high throughput: dispatch or none
  enum class Payload { plain, cast, fp8 };
  Payload payload = Payload::plain;  ///< cast: low latency alone; fp8: x is given as fp8
  bool bias = false;
  bool wide_ids = true;  ///< int64 expert ids, else int32
  bool preallocated = false;
  bool split = false;  ///< low latency: send and receive halves apart
  // High throughput alone.
  HighThroughput::Output output = HighThroughput::Output::owned;
  HighThroughput::Layout layout = HighThroughput::Layout::token_major;
  int alignment = 1;          ///< expert-major: of this rank's groups
  double capacity = 0;        ///< share of the needed rows to give as capacity; 0: eager counts
  bool in_place = false;      ///< pool output: write expert outputs over the pool rows
  bool weights_home = false;  ///< bring top-k weights home
  bool cached = false;        ///< dispatch again with the handle, and compare once more
};

/// One dispatch, the stand-in experts, one combine, everything compared with the oracle.
/// Collective.
Report round_trip(LowLatency& object, const Communicator& communicator, const Workload& workload,
                  int step, const RoundTripOptions& options);
Report round_trip(HighThroughput& object, const Communicator& communicator,
                  const Workload& workload, int step, const RoundTripOptions& options);

/// The stand-in experts over the outputs of a dispatch; `y` has the layout of x.
struct ExpertPass {
  const Workload* workload;
  int rank;
};
/// The values of row `row` of a dispatch's x, scaled if there are scales.
Row values_of(const TensorView& x, const TensorView& scales, std::int64_t row);
void run_experts(const ExpertPass& pass, const LowLatency::Outputs& outputs, std::byte* y);
/// Token-major: sums over this rank's experts in top-k order, with the weights if `weighted`.
void run_experts(const ExpertPass& pass, const HighThroughput::Outputs& outputs, std::int64_t rows,
                 bool weighted, std::byte* y);
/// Expert-major: each row through the expert that it is for.
void run_grouped_experts(const ExpertPass& pass, const HighThroughput::Outputs& outputs,
                         std::byte* y);

}  // namespace expertwire::reference
