#pragma once

#include <cstdint>
#include <vector>

#include "expertwire/shape.hpp"
#include "reference/routing_pattern.hpp"

namespace expertwire::reference {

/// What a job works on; every rank can make every rank's part of it.
struct WorkloadSpec {
  MoeShape shape;
  int ranks = 1;
  std::uint64_t seed = 1;
  RoutingPattern routing;
  /// T differs between ranks and steps, with zeros; otherwise T = M.
  bool ragged = false;
  /// Chance that a selection repeats the one before it.
  double repeats = 0;
};

/// What one rank brings to one step.
struct RankInput {
  int tokens = 0;
  std::vector<std::byte> x;            ///< [T, H]
  std::vector<std::int64_t> topk_idx;  ///< [T, K]
  std::vector<float> topk_weights;     ///< [T, K]
  std::vector<std::byte> bias;         ///< [T, H]
};

class Workload {
 public:
  explicit Workload(const WorkloadSpec& spec);
  const WorkloadSpec& spec() const { return spec_; }

  int tokens(int rank, int step) const;
  /// The routing of all of a rank's tokens.
  std::vector<std::int64_t> topk_idx(int rank, int step) const;
  std::vector<float> topk_weights(int rank, int step) const;
  /// Row of one token, as bytes of the row type. `bias` makes another, unrelated row.
  void fill_row(int rank, int step, int token, bool bias, std::byte* row) const;
  RankInput input(int rank, int step) const;

 private:
  WorkloadSpec spec_;
  RoutingPattern::Shape pattern_shape_;
  std::vector<double> popularity_;
};

}  // namespace expertwire::reference
