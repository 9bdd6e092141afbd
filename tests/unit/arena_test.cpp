#include <gtest/gtest.h>

#include "comm/segment.hpp"
#include "expertwire/error.hpp"
#include "expertwire/memory.hpp"

namespace expertwire {
namespace {

TEST(Arena, CarvesDisjointPiecesAndReusesWhatComesBack) {
  Segment segment = create_segment(64 * 4096);
  Arena arena({Memory(0, segment.mapping, segment.bytes)}, 0);
  const auto a = arena.carve(4096), b = arena.carve(5000), c = arena.carve(1);
  EXPECT_EQ(a % 4096, 0U);
  EXPECT_GE(b, a + 4096);
  EXPECT_GE(c, b + 8192);
  arena.give_back(b);
  EXPECT_EQ(arena.carve(8192), b);
  arena.give_back(a);
  arena.give_back(a);  // nothing is there any more: nothing happens
  EXPECT_EQ(arena.carved(), 3U * 4096);
  retire_segment(segment.id);
}

TEST(Arena, GivesPagesBackToTheSystem) {
  Segment segment = create_segment(16 * 4096);
  Arena arena({Memory(0, segment.mapping, segment.bytes)}, 0);
  const auto a = arena.carve(4096);
  arena.local().data()[a] = std::byte{7};
  arena.give_back(a);
  EXPECT_EQ(arena.local().data()[a], std::byte{0});
  retire_segment(segment.id);
}

TEST(Arena, SaysHowMuchIsMissing) {
  Segment segment = create_segment(4 * 4096);
  Arena arena({Memory(0, segment.mapping, segment.bytes)}, 0);
  try {
    arena.carve(5 * 4096);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::capacity);
    EXPECT_NE(std::string(error.what()).find("EXPERTWIRE_ARENA_BYTES"), std::string::npos);
  }
  EXPECT_EQ(arena.carve(4 * 4096), 0U);
  retire_segment(segment.id);
}

Deadline in(std::chrono::milliseconds time) { return Deadline::after(time); }

TEST(Arena, WaitsForWhatWillComeBackAndForNothingElse) {
  Segment segment = create_segment(4 * 4096);
  Arena arena({Memory(0, segment.mapping, segment.bytes)}, 0);
  const auto three = arena.carve(3 * 4096), one = arena.carve(4096);
  int looks = 0;
  arena.give_back_when(three, [&] { return ++looks > 3; });
  EXPECT_EQ(arena.carve(3 * 4096, in(std::chrono::hours(1))), three);
  EXPECT_EQ(looks, 4);
  // Nothing is on its way back, or too little: no wait, however long it might be.
  EXPECT_THROW(arena.carve(4096, in(std::chrono::hours(24))), Error);
  arena.give_back_when(one, [] { return false; });
  EXPECT_THROW(arena.carve(2 * 4096, in(std::chrono::hours(24))), Error);
  EXPECT_THROW(arena.carve(4096, in(std::chrono::milliseconds(20))), Error);
  retire_segment(segment.id);
}

TEST(Segment, IsFoundWhileItsRankIsThereAndLivesWhileItIsUsed) {
  Segment segment = create_segment(4096);
  const auto id = segment.id;
  auto mapping = find_segment(id);
  ASSERT_EQ(mapping, segment.mapping);
  EXPECT_FALSE(segment_retired(id));
  retire_segment(id);
  segment = {};
  EXPECT_TRUE(segment_retired(id));
  EXPECT_EQ(find_segment(id), nullptr);
  *mapping = std::byte{3};  // still mapped
}

TEST(Segment, AnotherMappingSeesTheSameBytes) {
  Segment segment = create_segment(8192);
  auto other = map_segment(segment.fd, 8192);
  segment.mapping.get()[5000] = std::byte{42};
  EXPECT_EQ(other.get()[5000], std::byte{42});
  retire_segment(segment.id);
}

}  // namespace
}  // namespace expertwire
