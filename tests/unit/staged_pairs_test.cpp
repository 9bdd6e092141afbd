#include "comm/staged_pairs.hpp"

#include <gtest/gtest.h>

#include <string>

#include "expertwire/error.hpp"

namespace expertwire {
namespace {

TEST(StagedPairs, NamesPairsInEitherOrder) {
  const StagedPairs some("0-1,3-2", 4);
  for (int a = 0; a < 4; ++a)
    for (int b = 0; b < 4; ++b)
      EXPECT_EQ(some.has(a, b), (a + b == 1) || (a + b == 5 && a != b && a > 1)) << a << b;
  EXPECT_TRUE(StagedPairs("all", 3).has(2, 0));
  for (const char* text : {"", "none"}) EXPECT_FALSE(StagedPairs(text, 3).has(0, 1));
}

TEST(StagedPairs, RefusesWhatIsNone) {
  for (const char* text :
       {"0-4", "1-1", "0", "0-", "-1-2", "0-1,", "0-1;2-3", "0-1 ", "some", ","}) {
    try {
      const StagedPairs pairs(text, 4);
      FAIL() << "'" << text << "' was taken";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
      EXPECT_NE(std::string(error.what()).find(text), std::string::npos);
      EXPECT_NE(std::string(error.what()).find("below 4"), std::string::npos);
    }
  }
}

}  // namespace
}  // namespace expertwire
