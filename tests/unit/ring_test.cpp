#include "ep/protocol/ring.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

namespace expertwire::ep {
namespace {

// A model of three ranks whose rows pass through rings of two frames, one step at a time, in every
// possible order: the roles of a dispatch, or those of a combine. Words are read and written by the
// real functions. Each rule by which nobody waits in a circle can be taken away.

constexpr int kRanks = 3, kMostTokens = 4;
constexpr std::uint32_t kFrames = 2;
constexpr Epoch kStart = 0xFFFFFFFD;  // numbers wrap while the model runs

enum class Rule {
  none,       ///< nothing is taken away
  credit,     ///< a writer does not look whether a frame has been read
  flag,       ///< a reader does not look whether a frame is there
  announce,   ///< a writer may wait before it has announced what it has written
  give_back,  ///< a reader may wait before it has given back what it has read
  whichever,  ///< a role that serves several rings takes them one behind the other
  in_order,   ///< tokens are begun with the last
};

struct Model {
  static inline Rule without = Rule::none;

  static bool removed(Fault part) {
    return (part == Fault::credit && without == Rule::credit) ||
           (part == Fault::flag && without == Rule::flag);
  }
  static Epoch acquire(const Epoch* word, Fault) { return *word; }
  static void release(Epoch* word, Epoch value, Fault) { *word = value; }
  static void store_after_reads(Epoch* word, Epoch value, Fault) { *word = value; }
};
bool holds(Rule rule) { return Model::without != rule; }

struct Ring {
  Epoch arrived[kFrames], taken[kFrames];
  std::uint32_t token[kFrames];  // the payload
};

/// What a role has begun and not finished: written and not announced, or read and not given back.
struct Held {
  std::int8_t peer = -1, row = -1;
  bool any() const { return peer >= 0; }
};

/// A role that serves rings: how far it is in each, or at which token, and what it holds: two rows
/// or tokens at most, so that all frames of a ring can be held.
struct Worker {
  std::int8_t next[kRanks] = {};
  std::int8_t token = 0, destination = 0;
  Held older[kRanks], newer[kRanks];  // a summer holds a frame a rank, others one at [0]
};

struct State {
  Ring rings[kRanks][kRanks];  // [writer][reader]
  Worker writers[kRanks], readers[kRanks];

  Epoch* arrived(int writer, int reader, Epoch f) {
    return &rings[writer][reader].arrived[f % kFrames];
  }
  Epoch* taken(int writer, int reader, Epoch f) {
    return &rings[writer][reader].taken[f % kFrames];
  }
  std::uint32_t* token(int writer, int reader, Epoch f) {
    return &rings[writer][reader].token[f % kFrames];
  }
};

/// Which tokens of `home` have a row at `rank`, ascending: the rows of the ring between the two.
using Routing = std::function<bool(int home, int token, int rank)>;

class Explorer {
 public:
  Explorer(bool combine, int tokens, const Routing& goes) : combine_(combine), tokens_(tokens) {
    for (int home = 0; home < kRanks; ++home)
      for (int rank = 0; rank < kRanks; ++rank)
        for (int t = 0; t < tokens; ++t)
          if (rank != home && goes(home, t, rank)) rows_[home][rank].push_back(t);
  }

  /// Walks all interleavings; returns what went wrong first, if anything.
  std::optional<std::string> explore() {
    State start;
    std::memset(static_cast<void*>(&start), 0, sizeof(start));
    for (auto& of_writer : start.rings)
      for (Ring& ring : of_writer)
        for (std::uint32_t i = 0; i < kFrames; ++i) ring.arrived[i] = ring.taken[i] = kStart;
    for (int r = 0; r < kRanks; ++r) start.writers[r] = start.readers[r] = Worker();
    std::vector<State> stack{start};
    while (!stack.empty() && !wrong_) {
      const State state = stack.back();
      stack.pop_back();
      after_.clear();
      for (int r = 0; r < kRanks; ++r) {
        combine_ ? push(state, r) : send(state, r);
        combine_ ? sum(state, r) : take(state, r);
      }
      bool ended = after_.empty();
      for (int r = 0; r < kRanks && ended; ++r) ended = done(state, r);
      if (after_.empty() && !ended) wrong_ = "a state in which nobody can move";
      for (State& next : after_)
        if (seen_.insert(key(next)).second) stack.push_back(next);
    }
    return wrong_;
  }
  std::size_t states() const { return seen_.size(); }

 private:
  static constexpr Epoch frame(int row) { return kStart + 1 + static_cast<Epoch>(row); }
  /// 64 bits of a hash: among millions of states that two have the same is one in a million.
  static std::size_t key(const State& state) {
    return std::hash<std::string_view>()({reinterpret_cast<const char*>(&state), sizeof(state)});
  }
  int rows_between(int home, int rank) const { return static_cast<int>(rows_[home][rank].size()); }
  /// Rows of the ring from `writer` to `reader`: of a dispatch the writer's tokens, of a combine
  /// the reader's.
  const std::vector<int>& rows_of(int writer, int reader) const {
    return combine_ ? rows_[reader][writer] : rows_[writer][reader];
  }
  int token_at(int i) const { return holds(Rule::in_order) ? i : tokens_ - 1 - i; }
  int row_of(int home, int token, int rank) const {
    const auto& rows = rows_[home][rank];
    for (std::size_t i = 0; i < rows.size(); ++i)
      if (rows[i] == token) return static_cast<int>(i);
    return -1;
  }

  // Words ----------------------------------------------------------------------------------------

  bool has_room_for(State state, int writer, int reader, int row) const {
    return has_room<Model>(state.taken(writer, reader, frame(row)), frame(row), kFrames);
  }
  void write(State& state, int writer, int reader, int row) const {
    *state.token(writer, reader, frame(row)) =
        static_cast<std::uint32_t>(rows_of(writer, reader)[static_cast<std::size_t>(row)] + 1);
  }
  static void announce(State& state, int writer, Held held) {
    publish<Model>(state.arrived(writer, held.peer, frame(held.row)), frame(held.row));
  }
  bool has_come(State state, int writer, int reader, int row) const {
    return arrived<Model>(state.arrived(writer, reader, frame(row)), frame(row));
  }
  void read(State& state, int writer, int reader, int row) {
    const int wanted = rows_of(writer, reader)[static_cast<std::size_t>(row)];
    if (*state.token(writer, reader, frame(row)) != static_cast<std::uint32_t>(wanted + 1))
      wrong_ = "a reader read another row";
  }
  static void give_back(State& state, int reader, Held held) {
    ep::give_back<Model>(state.taken(held.peer, reader, frame(held.row)), frame(held.row));
  }

  // Roles ----------------------------------------------------------------------------------------

  static Held held_row(int peer, int row) {
    return {static_cast<std::int8_t>(peer), static_cast<std::int8_t>(row)};
  }
  /// A writer holds a row more, and announces the one before last.
  static void hold_written(State& state, int r, Held row) {
    Worker& mine = state.writers[r];
    if (mine.older[0].any()) announce(state, r, mine.older[0]);
    mine.older[0] = mine.newer[0];
    mine.newer[0] = row;
  }
  /// A reader holds the rows of a token more, or one row, and gives back those before last.
  static void hold_read(State& state, int r, const std::array<Held, kRanks>& rows) {
    Worker& mine = state.readers[r];
    for (std::size_t i = 0; i < kRanks; ++i) {
      if (mine.older[i].any()) give_back(state, r, mine.older[i]);
      mine.older[i] = mine.newer[i];
      mine.newer[i] = rows[i];
    }
  }
  /// A writer that must wait, or has ended, announces what it holds, one by one.
  void settle_written(const State& state, int r, bool ended) {
    if (!ended && !holds(Rule::announce)) return;
    State after = state;
    Worker& mine = after.writers[r];
    Held& held = mine.older[0].any() ? mine.older[0] : mine.newer[0];
    if (!held.any()) return;
    announce(after, r, held);
    held = {};
    after_.push_back(after);
  }
  void settle_read(const State& state, int r, bool ended) {
    if (!ended && !holds(Rule::give_back)) return;
    State after = state;
    Worker& mine = after.readers[r];
    for (Held* all : {mine.older, mine.newer})
      for (Held* held = all; held != all + kRanks; ++held)
        if (held->any()) {
          give_back(after, r, *held);
          *held = {};
          after_.push_back(after);
          return;
        }
  }

  /// Dispatch: tokens in order, a row for each of a token's ranks.
  void send(const State& state, int r) {
    const Worker& w = state.writers[r];
    if (w.token == tokens_) return settle_written(state, r, true);
    State after = state;
    Worker& mine = after.writers[r];
    const int rank = w.destination, row = row_of(r, token_at(w.token), rank);
    if (row >= 0 && !has_room_for(state, r, rank, row)) return settle_written(state, r, false);
    if (row >= 0) {
      write(after, r, rank, row);
      hold_written(after, r, held_row(rank, row));
    }
    if (++mine.destination == kRanks) {
      mine.destination = 0;
      ++mine.token;
    }
    after_.push_back(after);
  }

  /// Dispatch: rows from whichever ring has some. Without that rule the reader begins with the rank
  /// behind its own and goes on when that ring has brought all its rows.
  void take(const State& state, int r) {
    bool ended = true, moved = false;
    for (int i = 1; i < kRanks; ++i) {
      const int source = (r + i) % kRanks, row = state.readers[r].next[source];
      if (row == rows_between(source, r)) continue;
      const bool first = ended;
      ended = false;
      if (!holds(Rule::whichever) && !first) continue;
      if (!has_come(state, source, r, row)) continue;
      State after = state;
      read(after, source, r, row);
      ++after.readers[r].next[source];
      hold_read(after, r, {held_row(source, row)});
      after_.push_back(after);
      moved = true;
    }
    if (!moved) settle_read(state, r, ended);
  }

  /// Combine: rows home, to whichever ring has room; without that rule as above.
  void push(const State& state, int r) {
    const Worker& w = state.writers[r];
    bool ended = true, moved = false;
    for (int i = 1; i < kRanks; ++i) {
      const int home = (r + i) % kRanks, row = w.next[home];
      if (row == rows_between(home, r)) continue;
      const bool first = ended;
      ended = false;
      if (!holds(Rule::whichever) && !first) continue;
      if (!has_room_for(state, r, home, row)) continue;
      State after = state;
      write(after, r, home, row);
      ++after.writers[r].next[home];
      hold_written(after, r, held_row(home, row));
      after_.push_back(after);
      moved = true;
    }
    if (!moved) settle_written(state, r, ended);
  }

  /// Combine: tokens in ascending order, each when all its rows are there.
  void sum(const State& state, int r) {
    const Worker& w = state.readers[r];
    const bool ended = w.token == tokens_;
    bool all = !ended;
    for (int rank = 0; rank < kRanks && all; ++rank) {
      const int row = row_of(r, token_at(w.token), rank);
      all = row < 0 || has_come(state, rank, r, row);
    }
    if (!all) return settle_read(state, r, ended);
    State after = state;
    std::array<Held, kRanks> rows;
    for (int rank = 0; rank < kRanks; ++rank) {
      const int row = row_of(r, token_at(w.token), rank);
      if (row < 0) continue;
      read(after, rank, r, row);
      rows[static_cast<std::size_t>(rank)] = held_row(rank, row);
    }
    hold_read(after, r, rows);
    ++after.readers[r].token;
    after_.push_back(after);
  }

  bool done(const State& state, int r) const {
    const Worker &w = state.writers[r], &reader = state.readers[r];
    for (int peer = 0; peer < kRanks; ++peer) {
      if (combine_ && w.next[peer] != rows_between(peer, r)) return false;
      if (!combine_ && reader.next[peer] != rows_between(peer, r)) return false;
    }
    return combine_ ? reader.token == tokens_ : w.token == tokens_;
  }

  bool combine_;
  int tokens_;
  std::vector<int> rows_[kRanks][kRanks];  // [home][rank] tokens
  std::vector<State> after_;
  std::unordered_set<std::size_t> seen_;
  std::optional<std::string> wrong_;
};

struct Scenario {
  const char* name;
  bool combine;
  int tokens;
  Routing goes;
};

bool everywhere(int, int, int) { return true; }
/// Every rank sends its first tokens to the rank behind it, the last one to the one before.
bool around(int home, int token, int rank) {
  return (rank - home + kRanks) % kRanks == (token < 3 ? 1 : 2);
}
/// To one rank more of them, and some to both.
bool mixed(int home, int token, int rank) { return rank == 0 || (home + token + rank) % 3 == 0; }
/// Of three tokens each; two ranks exchange nothing with each other.
bool through_one(int home, int, int rank) { return home == 1 || rank == 1; }

const std::array kScenarios = {
    Scenario{"dispatch everywhere", false, 2, everywhere},
    Scenario{"dispatch around", false, 4, around},
    Scenario{"dispatch mixed", false, 4, mixed},
    Scenario{"dispatch through one", false, 3, through_one},
    Scenario{"combine everywhere", true, 3, everywhere},
    Scenario{"combine around", true, 4, around},
    Scenario{"combine mixed", true, 4, mixed},
    Scenario{"combine through one", true, 4, through_one},
};

TEST(RingModel, EveryInterleavingIsRight) {
  Model::without = Rule::none;
  for (const Scenario& scenario : kScenarios) {
    Explorer explorer(scenario.combine, scenario.tokens, scenario.goes);
    EXPECT_EQ(explorer.explore(), std::nullopt) << scenario.name;
    EXPECT_GT(explorer.states(), 1'000U) << scenario.name;
    RecordProperty(scenario.name, std::to_string(explorer.states()));
  }
}

struct Removal {
  Rule rule;
  bool combine;
};

class RingModelRule : public testing::TestWithParam<Removal> {};

/// Without the rule something goes wrong, in a dispatch and in a combine.
TEST_P(RingModelRule, IsNeeded) {
  Model::without = GetParam().rule;
  int found = 0;
  for (const Scenario& scenario : kScenarios) {
    if (scenario.combine != GetParam().combine) continue;
    Explorer explorer(scenario.combine, scenario.tokens, scenario.goes);
    found += explorer.explore().has_value() ? 1 : 0;
  }
  Model::without = Rule::none;
  EXPECT_GT(found, 0);
}

INSTANTIATE_TEST_SUITE_P(
    Rules, RingModelRule,
    testing::Values(Removal{Rule::credit, false}, Removal{Rule::flag, false},
                    Removal{Rule::announce, false}, Removal{Rule::give_back, false},
                    Removal{Rule::whichever, false}, Removal{Rule::in_order, false},
                    Removal{Rule::credit, true}, Removal{Rule::flag, true},
                    Removal{Rule::announce, true}, Removal{Rule::give_back, true},
                    Removal{Rule::whichever, true}, Removal{Rule::in_order, true}));

TEST(Ring, NumbersWrapFromPlaceToPlace) {
  RingSlots ring;
  ring.frames = 8;
  ring.stride = 128;
  EXPECT_EQ(ring.at(0xFFFFFFFF), 7U);
  EXPECT_EQ(ring.at(0), 0U);
  EXPECT_EQ(ring.frame_of(0xFFFFFFFE), 6U * 128);
}

}  // namespace
}  // namespace expertwire::ep
