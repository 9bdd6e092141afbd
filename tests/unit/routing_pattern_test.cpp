#include "reference/routing_pattern.hpp"

#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>
#include <set>
#include <stdexcept>

namespace expertwire::reference {
namespace {

constexpr RoutingPattern::Shape kShape{8, 64, 6, 9};

std::vector<std::int64_t> draw_many(const std::string& text, int tokens) {
  const RoutingPattern pattern = RoutingPattern::parse(text);
  const auto popularity = pattern.popularity(kShape);
  Random random{1};
  std::vector<std::int64_t> all;
  for (int t = 0; t < tokens; ++t) {
    const auto row = pattern.draw(kShape, popularity, t, random);
    EXPECT_EQ(row.size(), 6U);
    std::multiset<std::int64_t> seen(row.begin(), row.end());
    for (std::int64_t id : row) {
      EXPECT_GE(id, -1);
      EXPECT_LT(id, 64);
      EXPECT_TRUE(id < 0 || seen.count(id) == 1);
    }
    all.insert(all.end(), row.begin(), row.end());
  }
  return all;
}

TEST(RoutingPattern, SkewIsWhatTheNameSays) {
  EXPECT_LT(measure_skew(draw_many("uniform", 4000), 64, 8).expert_max_over_mean, 1.3);
  EXPECT_DOUBLE_EQ(measure_skew(draw_many("balanced", 4096), 64, 8).expert_max_over_mean, 1.0);
  EXPECT_GT(measure_skew(draw_many("powerlaw:1.01", 4000), 64, 8).expert_max_over_mean, 2.0);
  EXPECT_GT(measure_skew(draw_many("zipf:1.0", 4000), 64, 8).expert_max_over_mean, 3.0);
  EXPECT_GT(measure_skew(draw_many("lognormal:1.0", 4000), 64, 8).expert_max_over_mean, 2.0);
  EXPECT_GT(measure_skew(draw_many("hotrank:0.9", 4000), 64, 8).rank_max_over_mean, 6.0);
}

TEST(RoutingPattern, GroupsAndMasks) {
  const auto grouped = draw_many("grouped:8,2", 200);
  for (std::size_t t = 0; t < 200; ++t) {
    std::set<std::int64_t> groups;
    for (std::size_t k = 0; k < 6; ++k) groups.insert(grouped[t * 6 + k] / 8);
    EXPECT_LE(groups.size(), 2U);
  }
  const auto masked = draw_many("masked:0.5", 2000);
  const auto missing = std::count(masked.begin(), masked.end(), -1);
  EXPECT_NEAR(static_cast<double>(missing) / static_cast<double>(masked.size()), 0.5, 0.03);
}

TEST(RoutingPattern, ReadsTraces) {
  const std::string path = testing::TempDir() + "trace.txt";
  std::ofstream(path)
      << "# plain\n1 2 3\n"
      << R"({"layer": 0, "top_indices": [[4, 5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 99]]})"
      << "\n";
  const RoutingPattern pattern = RoutingPattern::parse("trace:" + path);
  Random random{1};
  using Ids = std::vector<std::int64_t>;
  EXPECT_EQ(pattern.draw(kShape, {}, 0, random), (Ids{1, 2, 3, -1, -1, -1}));
  EXPECT_EQ(pattern.draw(kShape, {}, 1, random), (Ids{4, 5, 6, 7, 8, 9}));
  EXPECT_EQ(pattern.draw(kShape, {}, 2, random), (Ids{10, 11, 12, 13, 14, -1}));
  EXPECT_EQ(pattern.draw(kShape, {}, 3, random), (Ids{1, 2, 3, -1, -1, -1}));
  std::remove(path.c_str());
}

TEST(RoutingPattern, RefusesWhatItDoesNotKnow) {
  for (const char* text : {"", "unifrom", "zipf", "zipf:x", "grouped:4", "trace:/nowhere"})
    EXPECT_THROW(RoutingPattern::parse(text), std::invalid_argument) << text;
}

}  // namespace
}  // namespace expertwire::reference
