#include "comm/rank_pairs.hpp"

#include <gtest/gtest.h>

#include <string>

#include "expertwire/error.hpp"

namespace expertwire {
namespace {

TEST(RankPairs, NamesPairsInEitherOrder) {
  const RankPairs some("pairs", "0-1,3-2", 4);
  for (int a = 0; a < 4; ++a)
    for (int b = 0; b < 4; ++b)
      EXPECT_EQ(some.has(a, b), (a + b == 1) || (a + b == 5 && a != b && a > 1)) << a << b;
  EXPECT_TRUE(RankPairs("pairs", "all", 3).has(2, 0));
  for (const char* text : {"", "none"}) EXPECT_FALSE(RankPairs("pairs", text, 3).has(0, 1));
}

TEST(RankPairs, RefusesWhatIsNone) {
  for (const char* text :
       {"0-4", "1-1", "0", "0-", "-1-2", "0-1,", "0-1;2-3", "0-1 ", "some", ","}) {
    try {
      const RankPairs pairs("the setting", text, 4);
      FAIL() << "'" << text << "' was taken";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
      EXPECT_NE(std::string(error.what()).find(text), std::string::npos);
      EXPECT_NE(std::string(error.what()).find("the setting is '"), std::string::npos);
      EXPECT_NE(std::string(error.what()).find("below 4"), std::string::npos);
    }
  }
}

}  // namespace
}  // namespace expertwire
