#include "expertwire/error.hpp"

#include <gtest/gtest.h>

#include <cerrno>
#include <string>
#include <type_traits>

#include "base/check.hpp"

namespace expertwire {
namespace {

TEST(Error, SaysWhoWhereAndWhat) {
  const Error error(ErrorCode::timeout, "waited 30 ms", {2, 5, Phase::dispatch_rows});
  EXPECT_STREQ(error.what(), "expertwire: timeout on rank 2 (dispatch rows): waited 30 ms");
  EXPECT_EQ(error.rank(), 2);
  EXPECT_EQ(error.peer(), 5);
  EXPECT_EQ(error.phase(), Phase::dispatch_rows);
  static_assert(std::is_nothrow_copy_constructible_v<Error>);
}

TEST(Error, EveryCodeAndPhaseHasAName) {
  for (int code = 0; code <= static_cast<int>(ErrorCode::failed_earlier); ++code)
    EXPECT_NE(to_string(static_cast<ErrorCode>(code)), "?");
  for (int phase = 0; phase <= static_cast<int>(Phase::channel); ++phase)
    EXPECT_NE(to_string(static_cast<Phase>(phase)), "?");
}

TEST(Check, ThrowsTheCodeWithTheText) {
  check_argument(true, "never {}", 1);
  try {
    check(false, ErrorCode::capacity, "{} of {}", 3, 4);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::capacity);
    EXPECT_STREQ(error.what(), "expertwire: out of capacity: 3 of 4");
  }
  EXPECT_EQ(check_system(7, "call"), 7);
  errno = ENOENT;
  EXPECT_THROW(check_system(-1, "open"), Error);
}

}  // namespace
}  // namespace expertwire
