#include "expertwire/dispatch_layout.hpp"

#include <gtest/gtest.h>

#include "expertwire/error.hpp"

namespace expertwire {
namespace {

Topology four_ranks_on_two_nodes() {
  std::vector<RankPlace> places(4);
  for (RankPlace& place : places) place.host = "here";
  return Topology(places, 2);
}

TEST(DispatchLayout, CountsEachTokenOncePerRankAndNode) {
  const Topology topology = four_ranks_on_two_nodes();
  // Experts 0-1 on rank 0, 2-3 on rank 1, 4-5 on rank 2, 6-7 on rank 3.
  const std::vector<std::int64_t> ids = {0,  1,  2,    // ranks 0, 1: node 0
                                         3,  6,  7,    // ranks 1, 3: both nodes
                                         -1, -1, -1,   //
                                         5,  5,  99};  // rank 2 twice; 99 does not exist
  const DispatchLayout layout =
      dispatch_layout({{ids.data(), DType::int64, {4, 3}}, 8, 4, &topology});
  EXPECT_EQ(layout.tokens_per_rank, (std::vector<std::int32_t>{1, 2, 1, 1}));
  EXPECT_EQ(layout.tokens_per_node, (std::vector<std::int32_t>{2, 2}));
  EXPECT_EQ(layout.tokens_per_expert, (std::vector<std::int32_t>{1, 1, 1, 1, 0, 2, 1, 1}));
  EXPECT_EQ(layout.is_token_in_rank, (std::vector<std::uint8_t>{1, 1, 0, 0,  //
                                                                0, 1, 0, 1,  //
                                                                0, 0, 0, 0,  //
                                                                0, 0, 1, 0}));
  EXPECT_EQ(layout.invalid_ids, 1);
}

TEST(DispatchLayout, TakesNarrowIdsAndNoTokens) {
  const std::vector<std::int32_t> ids = {1, 0};
  EXPECT_EQ(dispatch_layout({{ids.data(), DType::int32, {1, 2}}, 2, 2}).tokens_per_rank,
            (std::vector<std::int32_t>{1, 1}));
  EXPECT_EQ(dispatch_layout({{nullptr, DType::int32, {0, 2}}, 2, 2}).tokens_per_rank,
            (std::vector<std::int32_t>{0, 0}));
}

TEST(DispatchLayout, NamesWhatIsWrong) {
  const std::vector<std::int32_t> ids = {1, 0};
  try {
    dispatch_layout({{ids.data(), DType::int32, {1, 2}}, 48, 32});
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
    EXPECT_NE(std::string(error.what()).find("experts is 48 with 32 ranks"), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("is 24"), std::string::npos) << error.what();
  }
  EXPECT_THROW(dispatch_layout({{ids.data(), DType::fp32, {1, 2}}, 8, 4}), Error);
  const Topology topology = four_ranks_on_two_nodes();
  EXPECT_THROW(dispatch_layout({{ids.data(), DType::int32, {1, 2}}, 8, 8, &topology}), Error);
}

}  // namespace
}  // namespace expertwire
