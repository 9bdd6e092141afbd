#include "ep/front/route.hpp"

#include <gtest/gtest.h>

#include <map>
#include <vector>

#include "reference/random.hpp"

namespace expertwire::ep {
namespace {

TEST(Route, MatchesPlainCounting) {
  reference::Random random{3};
  for (int ranks : {1, 2, 3, 5, 8, 40, 160})
    for (int top_k : {1, 2, 8, 22, 32}) {
      const Placement placement{ranks, ranks * 4};
      const int tokens = 50;
      std::vector<std::int64_t> ids(static_cast<std::size_t>(tokens * top_k));
      for (auto& id : ids) id = random.below(ranks * 4 + 1) - 1;
      const Route route = make_route({ids.data(), true}, tokens, top_k, placement);

      std::vector<int> rows_to_rank(static_cast<std::size_t>(ranks), 0);
      std::vector<int> rows_to_expert(static_cast<std::size_t>(ranks * 4), 0);
      for (int t = 0; t < tokens; ++t) {
        std::map<int, int> expected;  // ascending ranks
        for (int k = 0; k < top_k; ++k) {
          const auto i = static_cast<std::size_t>(t * top_k + k);
          if (ids[i] < 0) {
            EXPECT_EQ(route.positions[i], -1);
            continue;
          }
          EXPECT_EQ(route.positions[i], rows_to_expert[static_cast<std::size_t>(ids[i])]++);
          const int rank = static_cast<int>(ids[i]) / 4;
          if (expected.count(rank) == 0)
            expected[rank] = rows_to_rank[static_cast<std::size_t>(rank)]++;
        }
        const Destination* list = route.destinations_of(t);
        int i = 0;
        for (const auto& [rank, row] : expected) {
          ASSERT_LT(i, route.width());
          EXPECT_EQ(list[i].rank, rank);
          EXPECT_EQ(list[i].row, row);
          ++i;
        }
        if (i < route.width()) {
          EXPECT_EQ(list[i].rank, -1);
        }
      }
      EXPECT_EQ(std::vector<int>(route.rows_to_rank.begin(), route.rows_to_rank.end()),
                rows_to_rank);
      EXPECT_EQ(std::vector<int>(route.rows_to_expert.begin(), route.rows_to_expert.end()),
                rows_to_expert);
    }
}

TEST(Route, IdsOutOfRangeCountAsNoSelection) {
  const std::vector<std::int32_t> ids = {0, 8, -2, 7, -1, 3};
  const Route route = make_route({ids.data(), false}, 3, 2, {2, 8});
  EXPECT_EQ(route.invalid_ids, 2);
  EXPECT_EQ(route.first_invalid, 1);
  EXPECT_EQ(route.experts, (std::vector<std::int32_t>{0, -1, -1, 7, -1, 3}));
}

}  // namespace
}  // namespace expertwire::ep
