#include "ep/cuda/kernel/tuning.hpp"

#include <gtest/gtest.h>

namespace expertwire::ep::cuda {
namespace {

constexpr double kLink = 350e3;  // bytes a microsecond

TEST(Tuning, WhatIsOnItsWayFollowsFromTheLinkOverTheBlocks) {
  for (int blocks : {13, 16, 24, 48, 64}) {
    const Sending sending = sending_of({blocks, kLink, false, true});
    EXPECT_NEAR(sending.stages_bytes * static_cast<double>(blocks), kLink * 8, blocks) << blocks;
  }
  EXPECT_EQ(sending_of({24, kLink, false, true}).stages_bytes, 116666U);
  EXPECT_EQ(sending_of({24, kLink / 2, false, true}).stages_bytes, 58333U);
}

TEST(Tuning, FewBlocksHaveAllTheirSharedMemoryAndManyTwoWarps) {
  const Sending few = sending_of({4, kLink, false, true});
  EXPECT_EQ(few.stages_bytes, kStagesBytes);
  EXPECT_EQ(few.warps, 8);
  const Sending many = sending_of({132, kLink, false, true});
  EXPECT_EQ(many.stages_bytes, 2U * 2 * 7168);
  EXPECT_EQ(many.warps, 2);
}

TEST(Tuning, WarpsHaveTwoStagesOfSevenKilobytesOrMore) {
  for (int blocks = 1; blocks <= 256; ++blocks) {
    const Sending sending = sending_of({blocks, kLink, false, true});
    EXPECT_GE(sending.stages_bytes / static_cast<std::uint32_t>(2 * sending.warps), 7168U)
        << blocks;
    EXPECT_GE(sending.warps, 2);
    EXPECT_LE(sending.warps, 8);
  }
}

TEST(Tuning, OwnedOutputLeavesRingsForReceivers) {
  for (const int blocks : {1, 16, 24, 48, 132}) {
    const Sending sending = sending_of({blocks, kLink, true, true});
    EXPECT_EQ(sending.stages_bytes, kStagesBytes);
    EXPECT_EQ(sending.warps, sending_of({blocks, kLink, false, true}).warps) << blocks;
  }
}

TEST(Tuning, EveryRingHasAWarpThatPushes) {
  for (const double link : {1.0, 5e3, kLink})
    for (const int blocks : {1, 2, 3, 24, 132})
      for (int rings = 0; rings < 128; ++rings)
        EXPECT_GE(pushers_of({blocks, link, true, true}, rings) * blocks * 32, rings);
  EXPECT_EQ(pushers_of({132, kLink, true, true}, 7), sending_of({132, kLink, true, true}).warps);
}

TEST(Tuning, WithoutBulkCopiesAllWarpsSend) {
  EXPECT_EQ(sending_of({132, kLink, false, false}).warps, 8);
}

TEST(Tuning, PiecesCoverARowAndFitTheirRing) {
  for (std::uint32_t row = 16; row <= 70'000; row += 16 * 37)
    for (int warps = 1; warps <= kHighThroughputWarps; ++warps)
      for (std::uint32_t ring : {kFewestStagesBytes, 57'344U, 100'001U, kStagesBytes})
        for (int parts : {1, 2, 8, 32}) {
          const Moving m = plan_moving({row, warps, parts, ring, true, false});
          const auto pieces = static_cast<std::uint32_t>(m.pieces);
          const auto stages = static_cast<std::uint32_t>(m.stages);
          EXPECT_EQ(m.piece_bytes % 16, 0U);
          EXPECT_EQ(m.stages_bytes % 128, 0U);
          EXPECT_GE(pieces * m.piece_bytes, row);
          EXPECT_LT((pieces - 1) * m.piece_bytes, row);
          EXPECT_LE(stages * static_cast<std::uint32_t>(parts) * m.piece_bytes, m.stages_bytes)
              << row << " " << warps << " " << ring << " " << parts;
          EXPECT_LE(static_cast<std::uint32_t>(warps) * m.stages_bytes, ring);
        }
  const Moving whole = plan_moving({14'336, 8, 1, kStagesBytes, false, true});
  EXPECT_EQ(whole.pieces, 1);
  EXPECT_EQ(whole.piece_bytes, 14'336U);
}

TEST(Tuning, WhatIsAskedForReplacesTheFormula) {
  const Sending formula{8, 1000};
  EXPECT_EQ(asked_or({}, formula).warps, 8);
  EXPECT_EQ(asked_or({}, formula).stages_bytes, 1000U);
  EXPECT_EQ(asked_or({3, 0}, formula).warps, 3);
  EXPECT_EQ(asked_or({3, 0}, formula).stages_bytes, 1000U);
  EXPECT_EQ(asked_or({0, 77}, formula).stages_bytes, 77U);
}

TEST(Tuning, ItemsAreCutEvenlyAndInOrder) {
  for (int blocks : {2, 3, 24, 132})
    for (int first : {0, 1})
      for (int items : {0, 1, 2, 23, 24, 131, 132, 133, 1024, 16384}) {
        const Cut tokens = cut(items, blocks, first);
        int next = 0, fewest = items, most = 0;
        for (int block = 0; block < blocks; ++block) {
          const Part part = tokens.of(block);
          const int count = part.end - part.begin;
          if (block < first) {
            EXPECT_EQ(count, 0);
            continue;
          }
          EXPECT_EQ(part.begin, next);
          next = part.end;
          fewest = std::min(fewest, count);
          most = std::max(most, count);
        }
        EXPECT_EQ(next, items);
        EXPECT_LE(most - fewest, 1);
        EXPECT_EQ(most, tokens.most());
      }
}

TEST(Tuning, ImagesAreWholeWhereTheyFit) {
  constexpr std::uint32_t kRoom = 220000, kHeader = 128, kRow = 14336;
  const Images few = plan_images({kHeader, kRow, 1, kRoom, true});
  EXPECT_TRUE(few.whole);
  EXPECT_EQ(few.count, 1);
  EXPECT_GE(few.stride, kHeader + kRow);
  EXPECT_EQ(few.stride % 128, 0U);
  const Images many = plan_images({kHeader, kRow, 100, kRoom, true});
  EXPECT_TRUE(many.whole);
  EXPECT_EQ(many.count, kMostImages);
  const Images longer = plan_images({kHeader, kRoom / 2 - kHeader, 3, kRoom, true});
  EXPECT_TRUE(longer.whole);
  EXPECT_EQ(longer.count, 1);
}

TEST(Tuning, ImagesAreHeadersWhereRowsDoNotFitOrNothingCopiesThem) {
  constexpr std::uint32_t kRoom = 220000, kHeader = 128;
  for (const Images& images : {plan_images({kHeader, kRoom, 3, kRoom, true}),
                               plan_images({kHeader, 14336, 3, kRoom, false})}) {
    EXPECT_FALSE(images.whole);
    EXPECT_EQ(images.stride, kHeader);
    EXPECT_EQ(images.count, 3);
  }
}

}  // namespace
}  // namespace expertwire::ep::cuda
