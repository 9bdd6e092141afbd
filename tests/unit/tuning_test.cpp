#include "ep/cuda/tuning.hpp"

#include <gtest/gtest.h>

namespace expertwire::ep::cuda {
namespace {

constexpr std::uint32_t kMost = 229376;
constexpr double kLink = 350e3;  // bytes a microsecond

TEST(Tuning, WhatIsOnItsWayFollowsFromTheLinkOverTheBlocks) {
  for (int blocks : {13, 16, 24, 48, 64}) {
    const Sending sending = sending_of({blocks, kLink, false, kMost});
    EXPECT_NEAR(sending.ring_bytes * static_cast<double>(blocks), kLink * 8, blocks) << blocks;
  }
  EXPECT_EQ(sending_of({24, kLink, false, kMost}).ring_bytes, 116666U);
  EXPECT_EQ(sending_of({24, kLink / 2, false, kMost}).ring_bytes, 58333U);
}

TEST(Tuning, FewBlocksHaveAllTheirSharedMemoryAndManyTwoWarps) {
  const Sending few = sending_of({4, kLink, false, kMost});
  EXPECT_EQ(few.ring_bytes, kMost);
  EXPECT_EQ(few.warps, 8);
  const Sending many = sending_of({132, kLink, false, kMost});
  EXPECT_EQ(many.ring_bytes, 2U * 2 * 7168);
  EXPECT_EQ(many.warps, 2);
}

TEST(Tuning, WarpsHaveTwoStagesOfSevenKilobytesOrMore) {
  for (int blocks = 1; blocks <= 256; ++blocks) {
    const Sending sending = sending_of({blocks, kLink, false, kMost});
    EXPECT_GE(sending.ring_bytes / static_cast<std::uint32_t>(2 * sending.warps), 7168U) << blocks;
    EXPECT_GE(sending.warps, 2);
    EXPECT_LE(sending.warps, 8);
  }
}

TEST(Tuning, OwnedOutputLeavesRingsForReceivers) {
  const Sending sending = sending_of({132, kLink, true, kMost});
  EXPECT_EQ(sending.ring_bytes, kMost);
  EXPECT_EQ(sending.warps, 8);
}

TEST(Tuning, WhatIsAskedForReplacesTheFormula) {
  const Sending formula{8, 1000};
  EXPECT_EQ(asked_or({}, formula).warps, 8);
  EXPECT_EQ(asked_or({}, formula).ring_bytes, 1000U);
  EXPECT_EQ(asked_or({3, 0}, formula).warps, 3);
  EXPECT_EQ(asked_or({3, 0}, formula).ring_bytes, 1000U);
  EXPECT_EQ(asked_or({0, 77}, formula).ring_bytes, 77U);
}

}  // namespace
}  // namespace expertwire::ep::cuda
