#pragma once

#include <cstdint>
#include <vector>

#include "reference/workload.hpp"

namespace expertwire::reference {

/// A row in fp32.
using Row = std::vector<float>;

/// Round to nearest even, to the row type and back.
float round_to(DType dtype, float value);
Row decode(DType dtype, const std::byte* row, std::size_t elements);
void encode(DType dtype, const Row& row, std::byte* out);

/// A row as fp8-e4m3 with a scale for every 128 channels; found by looking for the nearest of all
/// 256 codes.
struct Fp8Row {
  std::vector<std::byte> data;  ///< [H]
  std::vector<float> scales;    ///< [ceil(H/128)]
  Row values() const;           ///< each value times its scale, in fp32
};
Fp8Row to_fp8(const Row& row);
float e4m3_value(std::uint8_t code);

/// The stand-in for an expert: a scale and a rotation that differ by expert, so that a row that
/// went to the wrong expert, or a channel at the wrong place, shows.
Row apply_expert(DType dtype, int expert, const Row& x);

/// How many rows each rank took, of the layout; later ones count as zero.
struct Capacities {
  std::vector<std::int64_t> rows;  ///< [R]
  int alignment = 1;               ///< of groups
};

/// One row that a rank receives in token-major layout.
struct ReceivedRow {
  int source = 0;
  int token = 0;
  std::vector<std::int32_t> experts;  ///< [K] local expert, -1 if not here
  std::vector<float> weights;         ///< [K] 0 if not here
};

/// What plain loops over all ranks' inputs say about one step. Everything is computed from the
/// workload alone.
class Oracle {
 public:
  /// `fp8`: rows travel as to_fp8() of themselves, and experts work on those values.
  Oracle(const Workload& workload, int step, bool fp8 = false);

  /// Token-major rows of `rank`: ascending source, then token.
  std::vector<ReceivedRow> token_major(int rank) const;
  /// Expert-major rows of `rank`'s local expert: one per selection, in the same order, at most R*M.
  std::vector<ReceivedRow> expert_major(int rank, int local_expert) const;

  /// Rows of `rank` grouped by local expert, in each group in the same order, one per selection,
  /// whose expert and weight it has alone; source -1 for what pads a group.
  std::vector<ReceivedRow> grouped(int rank, int alignment) const;

  enum class Weights { none, given };
  /// What combine must give token `token` of `source`, when every rank's experts made
  /// apply_expert() of its row. Per rank fma in top-k order, rounded; then the ranks in ascending
  /// order, on top of the bias if there is one, rounded.
  /// `layout` says which selections had no room and count as zero.
  enum class Layout { token_major, expert_major, grouped };
  Row combined(int source, int token, Weights weights, bool bias, Layout layout,
               const Capacities* capacities = nullptr) const;
  /// The same layer in double precision without any rounding between, to compare roughly.
  std::vector<double> dense(int source, int token) const;

  /// A token's row before it travels.
  Row row_of(int source, int token, bool bias) const;
  int tokens(int rank) const { return static_cast<int>(ids_[at(rank)].size()) / top_k_; }
  /// The row that `expert_rank` makes of a token from its experts: the rank's partial sum.
  Row partial(int source, int token, int expert_rank, Weights weights, Layout layout,
              const Capacities* capacities = nullptr) const;
  /// Row of a selection, counted from 0 in [T, K], in its rank's output where groups lie there.
  std::int64_t grouped_row(int source, std::int64_t selection, int alignment) const;

 private:
  static std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }
  int rank_of(std::int64_t expert) const { return static_cast<int>(expert) / local_; }
  std::int64_t rows_per_expert() const;  ///< that low latency has room for
  Row received(int source, int token) const;

  const Workload& workload_;
  int step_;
  bool fp8_;
  int ranks_;
  int top_k_;
  int local_;
  DType dtype_;
  std::vector<std::vector<std::int64_t>> ids_;  // by rank
  std::vector<std::vector<float>> weights_;
  std::vector<std::vector<std::vector<std::int64_t>>> row_at_;  // [source][rank][token], -1: none
  std::vector<std::vector<std::int64_t>> of_expert_;  // [source][selection]: index in its expert
  std::vector<std::int64_t> of_all_;                  // [E]: rows of an expert
};

}  // namespace expertwire::reference
