#include "comm/proxy/fifo.hpp"

#include <gtest/gtest.h>

#include <array>
#include <optional>
#include <string>
#include <thread>
#include <unordered_set>
#include <vector>

#include "expertwire/error.hpp"

namespace expertwire {
namespace {

// A model of producers and one proxy that run the real functions of fifo.hpp, one step at a time,
// in every possible order; between its look at the head and its claim a producer may be overtaken.
// What a producer writes becomes visible at its next release at the latest, or at any time before,
// as on weakly ordered machines. Each part of the protocol can be taken away.

constexpr int kProducers = 3, kPushes = 2;
constexpr std::uint64_t kCapacity = 2;

struct Words {
  std::array<Trigger, kCapacity> slots{};
  std::uint64_t head = 0, tail = 0, tail_seen = 0;
};

struct State {
  Words memory;
  std::array<int, kProducers> pushed{};
  std::array<bool, kProducers> looked{}, claimed{}, late{};
  std::array<std::uint64_t, kProducers> head_seen{};
  std::array<std::uint64_t, kProducers> position{};
  std::array<Trigger, kProducers> unseen{};  // written to the claimed place, not yet visible
  bool reading = false;                      // the proxy has seen the turn and not yet read
  bool gave_back_early = false;
  std::uint64_t next = 0;
  std::array<int, kProducers> read{};  // triggers of each that the proxy has read

  FifoView view() {
    return {memory.slots.data(), &memory.head, &memory.tail, &memory.tail_seen, kCapacity};
  }
  std::string key() const {
    std::string text;
    auto add = [&](auto value) { text += std::to_string(value) + ","; };
    for (const Trigger& slot : memory.slots) add(slot.value), add(slot.turn);
    add(memory.head), add(memory.tail), add(memory.tail_seen);
    for (std::size_t p = 0; p < kProducers; ++p)
      add(pushed[p]), add(looked[p]), add(head_seen[p]), add(claimed[p]), add(late[p]),
          add(position[p]), add(unseen[p].value), add(read[p]);
    add(reading), add(gave_back_early), add(next);
    return text;
  }
};

/// The `Access` of the model.
struct ModelAccess {
  static inline State* state = nullptr;
  static inline std::size_t producer = 0;
  static inline FifoPart without = FifoPart::none;

  static bool removed(FifoPart part) { return without == part; }
  /// Of the head alone: what the producer saw when it looked.
  static std::uint64_t load(const std::uint64_t*) { return state->head_seen[producer]; }
  static std::uint64_t acquire(const std::uint64_t* word) { return *word; }
  static bool compare_exchange(std::uint64_t* word, std::uint64_t expected, std::uint64_t value) {
    if (*word != expected) return false;
    *word = value;
    return true;
  }
  static void write(Trigger*, const Trigger& trigger) {
    state->unseen[producer] = trigger;
    state->late[producer] = true;
  }
  static void show(std::size_t p) {
    state->memory.slots[state->position[p] % kCapacity].value = state->unseen[p].value;
    state->late[p] = false;
  }
  static void release(std::uint64_t* word, std::uint64_t value, FifoPart part) {
    if (part == FifoPart::turn_release && !removed(part)) show(producer);
    *word = value;
  }
};

class Explorer {
 public:
  std::optional<std::string> explore() {
    std::vector<State> stack{State()};
    while (!stack.empty() && !wrong_) {
      const State state = stack.back();
      stack.pop_back();
      after_.clear();
      for (std::size_t p = 0; p < kProducers; ++p) produce(state, p);
      consume(state);
      const bool ended = state.next == kProducers * kPushes && !state.reading;
      if (after_.empty() && !ended && !wrong_) wrong_ = "a state in which nobody can move";
      for (State& next : after_)
        if (seen_.insert(next.key()).second) stack.push_back(next);
    }
    return wrong_;
  }
  std::size_t states() const { return seen_.size(); }

 private:
  static std::int64_t value_of(std::size_t producer, int push) {
    return static_cast<std::int64_t>(producer) * 10 + push + 1;
  }
  void as(State& state, std::size_t producer) {
    ModelAccess::state = &state;
    ModelAccess::producer = producer;
  }

  void produce(const State& state, std::size_t p) {
    if (state.late[p]) {  // what was written becomes visible by itself
      State after = state;
      as(after, p);
      ModelAccess::show(p);
      after_.push_back(after);
      if (ModelAccess::removed(FifoPart::turn_release)) return;
    }
    if (state.pushed[p] == kPushes) return;
    State after = state;
    as(after, p);
    if (!state.claimed[p] && !state.looked[p]) {
      after.looked[p] = true;
      after.head_seen[p] = state.memory.head;
    } else if (!state.claimed[p]) {
      after.looked[p] = false;
      after.claimed[p] = claim<ModelAccess>(after.view(), &after.position[p]);
    } else {
      Trigger trigger;
      trigger.value = value_of(p, state.pushed[p]);
      commit<ModelAccess>(after.view(), after.position[p], trigger);
      after.claimed[p] = false;
      ++after.pushed[p];
    }
    after_.push_back(after);
  }

  void consume(const State& state) {
    if (state.next == kProducers * kPushes && !state.reading) return;
    State after = state;
    as(after, 0);
    if (!state.reading) {
      if (!committed<ModelAccess>(after.view(), state.next)) return;
      after.reading = true;
      if (ModelAccess::removed(FifoPart::tail_release)) {
        give_back<ModelAccess>(after.view(), state.next + 1);
        after.gave_back_early = true;
      }
    } else {
      const std::int64_t value = state.memory.slots[state.next % kCapacity].value;
      const auto p = static_cast<std::size_t>(value / 10);
      if (value == 0 || value != value_of(p, state.read[p])) {
        wrong_ = "a trigger was lost, torn, or read twice";
        return;
      }
      ++after.read[p];
      ++after.next;
      after.reading = false;
      if (!after.gave_back_early) give_back<ModelAccess>(after.view(), after.next);
      after.gave_back_early = false;
    }
    after_.push_back(after);
  }

  std::vector<State> after_;
  std::unordered_set<std::string> seen_;
  std::optional<std::string> wrong_;
};

std::optional<std::string> explore_without(FifoPart part, std::size_t* states = nullptr) {
  ModelAccess::without = part;
  Explorer explorer;
  auto wrong = explorer.explore();
  ModelAccess::without = FifoPart::none;
  if (states != nullptr) *states = explorer.states();
  return wrong;
}

TEST(FifoModel, HoldsInEveryOrder) {
  std::size_t states = 0;
  const auto wrong = explore_without(FifoPart::none, &states);
  EXPECT_FALSE(wrong) << *wrong;
  EXPECT_GT(states, 1000U);
}

TEST(FifoModel, EveryPartIsNeeded) {
  for (FifoPart part :
       {FifoPart::room, FifoPart::turn, FifoPart::turn_release, FifoPart::tail_release})
    EXPECT_TRUE(explore_without(part)) << static_cast<int>(part);
}

TEST(Fifo, ManyProducersLoseNothingAndKeepTheirOrder) {
  constexpr int kThreads = 8, kEach = 20000;
  const auto fifo = Fifo::for_threads(64);
  std::vector<std::thread> threads;
  for (std::uint32_t t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < kEach; ++i) {
        Trigger trigger;
        trigger.channel = t;
        trigger.value = i;
        trigger.bytes = static_cast<std::uint64_t>(i) * 3 + t;
        std::uint64_t position = 0;
        while (!fifo->try_push(trigger, &position)) std::this_thread::yield();
      }
    });
  std::array<int, kThreads> next{};
  int wrong = 0;
  for (int taken = 0; taken < kThreads * kEach;) {
    const Trigger* trigger = fifo->front();
    if (trigger == nullptr) {
      std::this_thread::yield();
      continue;
    }
    int& expected = next[trigger->channel];
    if (trigger->value != expected ||
        trigger->bytes != static_cast<std::uint64_t>(expected) * 3 + trigger->channel)
      ++wrong;
    ++expected;
    fifo->pop();
    ++taken;
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(fifo->front(), nullptr);
}

TEST(Fifo, IsFullAtItsCapacityAndTakesUpAgain) {
  const auto fifo = Fifo::for_threads(4);
  std::uint64_t position = 0;
  for (std::uint64_t i = 0; i < 4; ++i) {
    ASSERT_TRUE(fifo->try_push({}, &position));
    EXPECT_EQ(position, i);
  }
  EXPECT_FALSE(fifo->try_push({}, &position));
  ASSERT_NE(fifo->front(), nullptr);
  fifo->pop();
  EXPECT_TRUE(fifo->try_push({}, &position));
  EXPECT_EQ(position, 4U);
  EXPECT_FALSE(fifo->try_push({}, &position));
  EXPECT_THROW(Fifo::for_threads(3), Error);
}

}  // namespace
}  // namespace expertwire
