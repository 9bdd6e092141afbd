// What ranks tell each other of their calls: which differences count, what is said about them, and
// that a header stays where it is until it has been compared.

#include "ep/protocol/call.hpp"

#include <gtest/gtest.h>

#include <array>
#include <set>
#include <string>
#include <vector>

#include "base/env.hpp"
#include "ep/protocol/slots.hpp"
#include "expertwire/dtype.hpp"

namespace expertwire::ep {
namespace {

const Call kCall{0, static_cast<std::int32_t>(DType::bf16), 1, 7168, 8, 256, 128};

/// The first word in which two calls differ, as a sentence; empty if they belong together.
std::string difference(const Call& theirs, const Call& ours, Epoch their_dispatch = 9,
                       Epoch our_dispatch = 9) {
  for (int i = 0; i < Call::kWords; ++i) {
    const std::int32_t a = theirs.word(i, their_dispatch), b = ours.word(i, our_dispatch);
    EXPECT_EQ(Call::agree(i, a, b), Call::agree(i, b, a)) << i;
    if (!Call::agree(i, a, b)) return describe("op", {i, a, b}, 2, 0);
  }
  return "";
}

template <class Change>
std::string changed(Change change) {
  Call other = kCall;
  change(other);
  return difference(other, kCall);
}

TEST(Call, EveryWordCounts) {
  EXPECT_EQ(difference(kCall, kCall), "");
  EXPECT_EQ(changed([](Call& c) { c.format = static_cast<std::int32_t>(DType::fp8_e4m3); }),
            "op: rank 2 sends rows of fp8_e4m3 and rank 0 of bf16; all ranks send the same");
  EXPECT_EQ(changed([](Call& c) { c.hidden = 4096; }),
            "op: rank 2 has rows of 4096 elements and rank 0 of 7168; all ranks have the same");
  EXPECT_EQ(changed([](Call& c) { c.top_k = 6; }),
            "op: rank 2 selects 6 of 256 experts and rank 0 8 of 256; all ranks do the same");
  EXPECT_EQ(changed([](Call& c) { c.experts = 264; }),
            "op: rank 2 selects 8 of 264 experts and rank 0 8 of 256; all ranks do the same");
  EXPECT_EQ(changed([](Call& c) { c.max_tokens = 64; }),
            "op: rank 2 has max_tokens 64 and rank 0 128; all ranks have the same");
  EXPECT_NE(changed([](Call& c) { c.lane = 0; }).find("lane 0 and rank 0 one of lane 1"),
            std::string::npos);
  const Epoch first = Env::get().first_epoch;
  EXPECT_NE(difference(kCall, kCall, first + 3, first + 4)
                .find("rank 2 is at dispatch 3 of the lane and rank 0 at dispatch 4"),
            std::string::npos);
}

TEST(Call, OptionsCountUnlessARankHasNoTokens) {
  for (const std::int32_t option : {Call::kWeights, Call::kCapacity, Call::kCached})
    EXPECT_NE(changed([&](Call& c) { c.options = option; }), "") << option;
  const auto of = [](std::int32_t options) {
    Call call = kCall;
    call.options = options;
    return call;
  };
  EXPECT_EQ(difference(of(Call::kNoTokens), of(Call::kWeights)), "");
  EXPECT_EQ(difference(of(Call::kNoTokens), of(0)), "");
  EXPECT_NE(difference(of(Call::kNoTokens | Call::kCapacity), of(0)), "");
}

// Headers ----------------------------------------------------------------------------------------

/// Two ranks that exchange no row walk through operations in every interleaving. An operation waits
/// for credit, writes its header at the other rank, compares the other's of two operations ago, and
/// grants credit.
class Walk {
 public:
  explicit Walk(int lines) : lines_(lines) {}
  /// Whether a header was gone, or not yet there, when it was to be compared.
  bool loses_a_header() {
    State start{};
    for (Rank& rank : start) rank.headers.assign(static_cast<std::size_t>(lines_), 0);
    return visit(start);
  }

 private:
  static constexpr int kLast = 9;
  enum Step { kAwaitCredit, kTell, kCompare, kGrant };
  struct Rank {
    int n = 1, step = kAwaitCredit;
    int credit = 0;            // the latest that the other has granted
    std::vector<int> headers;  // that the other wrote here
    auto operator<=>(const Rank&) const = default;
  };
  using State = std::array<Rank, 2>;

  bool visit(const State& state) {
    if (!seen_.insert(state).second) return false;
    for (std::size_t r : {0U, 1U}) {
      State next = state;
      Rank &mine = next[r], &other = next[1 - r];
      if (mine.n > kLast) continue;
      const auto line = [&](int n) { return static_cast<std::size_t>(n % lines_); };
      if (mine.step == kAwaitCredit && mine.credit < mine.n - static_cast<int>(kSlots)) continue;
      if (mine.step == kTell) other.headers[line(mine.n)] = mine.n;
      const int earlier = mine.n - static_cast<int>(kSlots);
      if (mine.step == kCompare && earlier > 0 && mine.headers[line(earlier)] != earlier)
        return true;
      if (mine.step == kGrant) other.credit = mine.n;
      if (++mine.step > kGrant) ++mine.n, mine.step = kAwaitCredit;
      if (visit(next)) return true;
    }
    return false;
  }

  int lines_;
  std::set<State> seen_;
};

TEST(Call, HeadersStayUntilTheyAreCompared) {
  EXPECT_FALSE(Walk(static_cast<int>(DirectionSlots::kHeaderSlots)).loses_a_header());
  EXPECT_TRUE(Walk(2).loses_a_header());
  EXPECT_TRUE(Walk(3).loses_a_header());
}

}  // namespace
}  // namespace expertwire::ep
