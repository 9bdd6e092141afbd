#include "expertwire/stream.hpp"

#include <gtest/gtest.h>

#include <stdexcept>
#include <vector>

namespace expertwire {
namespace {

TEST(Queue, RunsInOrder) {
  Queue stream;
  std::vector<int> seen;
  for (int i = 0; i < 100; ++i) stream.enqueue([&seen, i] { seen.push_back(i); });
  stream.synchronize();
  ASSERT_EQ(seen.size(), 100U);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(seen[static_cast<std::size_t>(i)], i);
}

TEST(Queue, KeepsTheFirstErrorForSynchronize) {
  Queue stream;
  bool after = false;
  stream.enqueue([] { throw std::runtime_error("first"); });
  stream.enqueue([] { throw std::runtime_error("second"); });
  stream.enqueue([&] { after = true; });
  try {
    stream.synchronize();
    FAIL();
  } catch (const std::runtime_error& error) {
    EXPECT_STREQ(error.what(), "first");
  }
  EXPECT_TRUE(after);
  stream.synchronize();  // told once
}

TEST(Queue, FinishesWhatIsQueuedWhenItGoes) {
  int count = 0;
  {
    Queue stream;
    for (int i = 0; i < 50; ++i) stream.enqueue([&] { ++count; });
  }
  EXPECT_EQ(count, 50);
}

}  // namespace
}  // namespace expertwire
