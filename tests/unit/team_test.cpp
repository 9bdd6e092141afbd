#include "ep/cpu/team.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <vector>

namespace expertwire::ep::cpu {
namespace {

TEST(Team, EveryWorkerRunsOnceAndIsSeen) {
  for (int workers : {1, 2, 5}) {
    Team team(workers);
    for (int round = 0; round < 200; ++round) {
      std::vector<int> counts(static_cast<std::size_t>(workers), 0);
      team.run([&](int worker) { ++counts[static_cast<std::size_t>(worker)]; });
      EXPECT_EQ(counts, std::vector<int>(static_cast<std::size_t>(workers), 1));
    }
  }
}

TEST(Team, ThrowsTheFirstErrorAndWorksOn) {
  Team team(3);
  EXPECT_THROW(team.run([&](int worker) {
    if (worker == 2) throw std::runtime_error("two");
    while (!team.failed()->load()) {
    }
  }),
               std::runtime_error);
  std::atomic<int> count{0};
  team.run([&](int) { ++count; });
  EXPECT_EQ(count, 3);
  EXPECT_FALSE(team.failed()->load());
}

TEST(Team, PartsCoverEverythingInOrder) {
  for (int workers : {1, 3, 7})
    for (std::int64_t count : {0, 1, 6, 100}) {
      std::int64_t next = 0;
      for (int w = 0; w < workers; ++w) {
        const Span part = part_of(count, w, workers);
        EXPECT_EQ(part.begin, next);
        next = part.end;
      }
      EXPECT_EQ(next, count);
    }
}

}  // namespace
}  // namespace expertwire::ep::cpu
