#include "ep/protocol/lane.hpp"

#include <gtest/gtest.h>

#include <array>
#include <optional>
#include <string>
#include <thread>
#include <unordered_set>
#include <vector>

namespace expertwire::ep {
namespace {

// A model of R ranks that run the real functions of ep/protocol/lane.hpp, one step at a time, in
// every possible order. Writes of data may become visible late, up to the next release of their
// rank, as on weakly ordered machines; taking an ordering away lets them (or reads) pass it.

constexpr int kRanks = 3;
constexpr Epoch kStart = 0xFFFFFFFD;  // the second epoch after this one is 0
constexpr int kEpochs = 4;

/// All memory of the job. Element types are Epoch throughout, so that a state is a string of words.
struct Pair {
  Epoch flag[kSlots];
  Epoch payload[kSlots];  // holds the epoch it was written for
  Epoch consumed;
};
struct Memory {
  Pair pair[kRanks][kRanks];  // [owner][writer]
  DirectionWords words[kRanks];
};

struct Store {
  std::uint32_t word;  // index into Memory
  Epoch value;
};

struct State {
  Memory memory;
  std::array<int, kRanks> next{};                        // step of each rank
  std::array<std::vector<Store>, kRanks> unseen;         // stores that others do not see yet
  std::array<std::array<Epoch, kRanks>, kRanks> read{};  // what a rank read from each source

  Epoch* word(std::uint32_t index) { return reinterpret_cast<Epoch*>(&memory) + index; }
  std::string key() const {
    std::string text(reinterpret_cast<const char*>(&memory), sizeof(memory));
    for (int r = 0; r < kRanks; ++r) {
      const auto i = static_cast<std::size_t>(r);
      text += static_cast<char>(next[i]);
      text += static_cast<char>(unseen[i].size());
      for (const Store& s : unseen[i]) text.append(reinterpret_cast<const char*>(&s), sizeof(s));
      text.append(reinterpret_cast<const char*>(read[i].data()), sizeof(read[i]));
    }
    return text;
  }
};

/// The `Access` under which lane.hpp runs in the model.
struct ModelAccess {
  static inline State* state = nullptr;
  static inline int rank = 0;
  static inline Fault fault = Fault::none;

  static bool removed(Fault part) { return fault == part; }
  static Epoch load(const Epoch* word) { return *word; }
  static void store(Epoch* word, Epoch value) { *word = value; }
  static Epoch acquire(const Epoch* word, Fault) { return *word; }
  static void release(Epoch* word, Epoch value, Fault order) {
    if (removed(order)) {  // may be seen before what was written earlier
      *word = value;
      return;
    }
    auto& unseen = state->unseen[static_cast<std::size_t>(rank)];
    for (const Store& s : unseen) *state->word(s.word) = s.value;
    unseen.clear();
    *word = value;
  }
  static std::uint32_t count_up(std::uint32_t* word) { return (*word)++; }
};

enum class Op {
  await_credit,
  write,
  publish,
  finish_send,
  await_flag,
  read,
  check,
  grant,
  finish_receive
};

struct Step {
  Op op;
  Epoch n;
  int peer;
};

/// Who sends rows to whom in an epoch.
using Exchanges = bool (*)(Epoch n, int from, int to);
bool everybody(Epoch, int, int) { return true; }
bool some_pairs(Epoch n, int from, int to) {
  return (n + static_cast<Epoch>(2 * from + to)) % 3 != 0;
}
bool nobody_to_rank_0(Epoch, int, int to) { return to != 0; }

/// The steps of one rank. `halves` sends an operation before the one before it was received.
std::vector<Step> program(int rank, bool halves, Exchanges exchanges) {
  std::vector<Step> steps;
  auto send = [&](Epoch n) {
    for (int peer = 0; peer < kRanks; ++peer) {
      const bool rows = exchanges(n, rank, peer);
      // Without the acquire, a write may pass the look at the credit.
      const bool passes = ModelAccess::removed(Fault::credit_acquire);
      if (rows && passes) steps.push_back({Op::write, n, peer});
      steps.push_back({Op::await_credit, n, peer});
      if (rows && !passes) steps.push_back({Op::write, n, peer});
      if (rows) steps.push_back({Op::publish, n, peer});
    }
    steps.push_back({Op::finish_send, n, -1});
  };
  auto receive = [&](Epoch n) {
    auto each_source = [&](Op op) {
      for (int peer = 0; peer < kRanks; ++peer)
        if (op == Op::grant || exchanges(n, peer, rank)) steps.push_back({op, n, peer});
    };
    // Without the acquire a read may pass the look at the flag; without the release a credit may
    // pass the reads.
    if (ModelAccess::removed(Fault::flag_acquire)) each_source(Op::read);
    each_source(Op::await_flag);
    if (ModelAccess::removed(Fault::credit_release)) each_source(Op::grant);
    if (!ModelAccess::removed(Fault::flag_acquire)) each_source(Op::read);
    each_source(Op::check);
    if (!ModelAccess::removed(Fault::credit_release)) each_source(Op::grant);
    steps.push_back({Op::finish_receive, n, -1});
  };
  const Epoch last = kStart + kEpochs;
  if (!halves) {
    for (Epoch n = kStart + 1; n != last + 1; ++n) send(n), receive(n);
  } else {
    send(kStart + 1);
    for (Epoch n = kStart + 2; n != last + 1; ++n) send(n), receive(n - 1);
    receive(last);
  }
  return steps;
}

class Explorer {
 public:
  Explorer(bool halves, Exchanges exchanges) {
    for (int r = 0; r < kRanks; ++r) programs_.push_back(program(r, halves, exchanges));
  }

  /// Walks all interleavings; returns what went wrong first, if anything.
  std::optional<std::string> explore() {
    State start{};
    auto* words = reinterpret_cast<Epoch*>(&start.memory);
    std::fill(words, words + sizeof(Memory) / sizeof(Epoch), kStart);
    for (DirectionWords& w : start.memory.words) w.senders_done = w.receivers_done = 0;
    std::vector<State> stack{start};
    seen_.insert(start.key());
    while (!stack.empty()) {
      State state = std::move(stack.back());
      stack.pop_back();
      int moved = 0;
      bool ended = true;
      for (int r = 0; r < kRanks; ++r) {
        ended = ended && done(state, r);
        for (const bool late : {false, true}) {
          State after = state;
          if (!advance(after, r, late)) continue;
          ++moved;
          if (wrong_) return wrong_;
          if (seen_.insert(after.key()).second) stack.push_back(std::move(after));
        }
      }
      if (moved == 0 && !ended) return "a state in which nobody can move";
    }
    return std::nullopt;
  }
  std::size_t states() const { return seen_.size(); }

 private:
  bool done(const State& state, int r) const {
    const auto i = static_cast<std::size_t>(r);
    return static_cast<std::size_t>(state.next[i]) == programs_[i].size();
  }

  /// Takes the next step of rank r; false if it cannot (it waits, or has ended). `late` asks for
  /// the variant in which a write is seen later.
  bool advance(State& state, int r, bool late) {
    if (done(state, r)) return false;
    const auto self = static_cast<std::size_t>(r);
    const Step& step = programs_[self][static_cast<std::size_t>(state.next[self])];
    if (late && step.op != Op::write) return false;
    ModelAccess::state = &state;
    ModelAccess::rank = r;
    Memory& m = state.memory;
    const Direction<ModelAccess> lane{&m.words[r], &m.pair[r][0].consumed,
                                      sizeof(Pair) / sizeof(Epoch)};
    const auto peer = static_cast<std::size_t>(step.peer);
    const int slot = slot_of(step.n);
    switch (step.op) {
      case Op::await_credit:
        if (lane.sending() != step.n) wrong_ = "a send half works on the wrong epoch";
        if (!lane.may_write(step.peer, step.n)) return false;
        break;
      case Op::write: {
        Epoch* word = &m.pair[peer][self].payload[slot];
        if (late)
          state.unseen[self].push_back(
              {static_cast<std::uint32_t>(word - reinterpret_cast<Epoch*>(&m)), step.n});
        else
          *word = step.n;
        break;
      }
      case Op::publish:
        publish<ModelAccess>(&m.pair[peer][self].flag[slot], step.n);
        break;
      case Op::finish_send:
        lane.finish_send(step.n, 1);
        break;
      case Op::await_flag:
        if (lane.receiving() != step.n) wrong_ = "a receive half works on the wrong epoch";
        if (!arrived<ModelAccess>(&m.pair[self][peer].flag[slot], step.n)) return false;
        break;
      case Op::read:
        state.read[self][peer] = m.pair[self][peer].payload[slot];
        break;
      case Op::check:
        if (state.read[self][peer] != step.n) wrong_ = "a rank read rows of another epoch";
        state.read[self][peer] = 0;
        break;
      case Op::grant:
        grant<ModelAccess>(&m.pair[peer][self].consumed, step.n);
        break;
      case Op::finish_receive:
        lane.finish_receive(step.n, 1);
        break;
    }
    ++state.next[self];
    return true;
  }

  std::vector<std::vector<Step>> programs_;
  std::unordered_set<std::string> seen_;
  std::optional<std::string> wrong_;
};

struct Scenario {
  const char* name;
  bool halves;
  Exchanges exchanges;
};
constexpr std::array kScenarios = {
    Scenario{"fused", false, everybody},
    Scenario{"fused, some pairs exchange nothing", false, some_pairs},
    Scenario{"halves", true, everybody},
    Scenario{"halves, some pairs exchange nothing", true, some_pairs},
    Scenario{"halves, nobody sends to rank 0", true, nobody_to_rank_0},
};

TEST(LaneModel, EveryInterleavingIsRight) {
  ModelAccess::fault = Fault::none;
  for (const Scenario& scenario : kScenarios) {
    Explorer explorer(scenario.halves, scenario.exchanges);
    EXPECT_EQ(explorer.explore(), std::nullopt) << scenario.name;
    EXPECT_GT(explorer.states(), 10'000U) << scenario.name;
  }
}

class LaneModelFault : public testing::TestWithParam<Fault> {};

TEST_P(LaneModelFault, IsFound) {
  ModelAccess::fault = GetParam();
  int found = 0;
  for (const Scenario& scenario : kScenarios) {
    Explorer explorer(scenario.halves, scenario.exchanges);
    found += explorer.explore().has_value() ? 1 : 0;
  }
  ModelAccess::fault = Fault::none;
  EXPECT_GT(found, 0);
}

INSTANTIATE_TEST_SUITE_P(Parts, LaneModelFault,
                         testing::Values(Fault::credit, Fault::credit_acquire,
                                         Fault::credit_release, Fault::flag, Fault::flag_acquire,
                                         Fault::flag_release));

TEST(Lane, EpochsWrap) {
  EXPECT_TRUE(reached(1, 0xFFFFFFFF));
  EXPECT_FALSE(reached(0xFFFFFFFE, 0xFFFFFFFF));
  EXPECT_TRUE(reached(5, 5));
  EXPECT_NE(slot_of(0xFFFFFFFF), slot_of(0));
}

TEST(Lane, LastWorkerAdvancesTheCounterOnce) {
  constexpr int kWorkers = 4;
  DirectionWords words{7, 7, 0, 0};
  for (Epoch n = 8; n < 200; ++n) {
    const Direction<HostAccess> lane{&words, nullptr};
    std::vector<std::thread> workers;
    for (int w = 0; w < kWorkers; ++w)
      workers.emplace_back([&] {
        EXPECT_EQ(lane.sending(), n);
        lane.finish_send(n, kWorkers);
      });
    for (std::thread& worker : workers) worker.join();
    ASSERT_EQ(words.sent, n);
    ASSERT_EQ(words.senders_done, 0U);
  }
}

}  // namespace
}  // namespace expertwire::ep
