#include "reference/oracle.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "reference/random.hpp"

namespace expertwire::reference {
namespace {

Workload make_workload(const char* routing, double repeats = 0) {
  return Workload(
      {{64, 16, 4, 40, DType::bf16}, 4, 5, RoutingPattern::parse(routing), true, repeats});
}

// The oracle follows the contract's roundings; double precision without any must come close. This
// holds the oracle itself against arithmetic that knows nothing of ranks.
TEST(Oracle, IsCloseToTheDenseLayer) {
  const Workload workload = make_workload("zipf:0.7");
  const Oracle oracle(workload, 0);
  for (int rank = 0; rank < 4; ++rank)
    for (int t = 0; t < oracle.tokens(rank); ++t) {
      const Row row =
          oracle.combined(rank, t, Oracle::Weights::given, false, Oracle::Layout::token_major);
      const auto dense = oracle.dense(rank, t);
      for (std::size_t h = 0; h < row.size(); ++h)
        ASSERT_NEAR(static_cast<double>(row[h]), dense[h], 0.05 + 0.02 * std::abs(dense[h]));
    }
}

TEST(Oracle, LayoutsHoldEverySelectionOnce) {
  const Workload workload = make_workload("masked:0.3", 0.3);
  const Oracle oracle(workload, 1);
  std::size_t selections = 0, in_experts = 0, in_rows = 0;
  for (int rank = 0; rank < 4; ++rank) {
    for (std::int64_t id : workload.topk_idx(rank, 1)) selections += id >= 0 ? 1 : 0;
    for (int e = 0; e < 4; ++e) in_experts += oracle.expert_major(rank, e).size();
    std::set<std::pair<int, int>> seen;
    for (const ReceivedRow& row : oracle.token_major(rank)) {
      EXPECT_TRUE(seen.insert({row.source, row.token}).second);
      for (std::int32_t expert : row.experts) in_rows += expert >= 0 ? 1 : 0;
    }
  }
  EXPECT_GT(selections, 0U);
  EXPECT_EQ(in_experts, selections);
  EXPECT_EQ(in_rows, selections);
}

TEST(Oracle, ExpertsAndChannelsCanBeToldApart) {
  Row x(64);
  for (std::size_t h = 0; h < x.size(); ++h) x[h] = static_cast<float>(h + 1);
  std::set<std::vector<float>> results;
  for (int expert = 0; expert < 16; ++expert)
    EXPECT_TRUE(results.insert(apply_expert(DType::fp32, expert, x)).second) << expert;
}

TEST(Oracle, RoundsToNearestEven) {
  EXPECT_EQ(round_to(DType::bf16, 1.00390625F), 1.0F);       // tie, even below
  EXPECT_EQ(round_to(DType::bf16, 1.01171875F), 1.015625F);  // tie, even above
  EXPECT_EQ(round_to(DType::fp32, 1.00390625F), 1.00390625F);
}

TEST(Workload, EveryRankMakesTheSameData) {
  const Workload a = make_workload("uniform"), b = make_workload("uniform");
  EXPECT_EQ(a.input(2, 3).x, b.input(2, 3).x);
  EXPECT_EQ(a.topk_idx(1, 0), b.topk_idx(1, 0));
  EXPECT_NE(a.input(2, 3).x, a.input(2, 4).x);
  bool zero = false;
  for (int step = 0; step < 20; ++step)
    for (int rank = 0; rank < 4; ++rank) zero = zero || a.tokens(rank, step) == 0;
  EXPECT_TRUE(zero);
}

}  // namespace
}  // namespace expertwire::reference
