// Every wire keeps the contract of Connection, to memory that users have registered.

#include "ranks/wires.hpp"

namespace expertwire::test {
namespace {

class Wires : public testing::TestWithParam<Wire> {
 protected:
  void SetUp() override {
    if (!why_not(GetParam()).empty()) GTEST_SKIP() << why_not(GetParam());
  }
  void on(int ranks, const std::function<void(Communicator&)>& body) {
    with_wire(GetParam(), ranks, [&](const std::shared_ptr<Communicator>& c) { body(*c); });
  }
};

TEST_P(Wires, PutsBytesWhereTheyBelong) {
  on(3, [](Communicator& c) {
    const SharedMemory memory(c, GetParam(), 1 << 16);
    for (int peer = 0; peer < c.size(); ++peer) {
      const auto from = static_cast<std::size_t>(c.rank());
      auto* mine = memory.mine().data() + 32768 + 4096 * peer;
      for (int i = 0; i < 100; ++i) mine[i] = static_cast<std::byte>(i + 1 + 10 * c.rank());
      Connection& connection = c.connection(peer);
      connection.put({memory.of(peer), 1001 + 1024 * from, memory.mine(),
                      32768 + 4096 * static_cast<std::size_t>(peer) + 3, 51});
      connection.flush(soon());
    }
    c.barrier();
    for (int from = 0; from < c.size(); ++from) {
      const std::byte* came = memory.mine().data() + 1001 + 1024 * from;
      EXPECT_EQ(came[-1], std::byte{0});
      EXPECT_EQ(came[51], std::byte{0});
      for (int i = 0; i < 51; ++i)
        ASSERT_EQ(came[i], static_cast<std::byte>(i + 4 + 10 * from)) << i;
    }
  });
}

TEST_P(Wires, SignalIsSeenAfterThePutsBeforeIt) {
  on(2, [](Communicator& c) {
    constexpr std::uint64_t kRounds = 3000;
    const SharedMemory memory(c, GetParam(), 1 << 16);
    const int peer = 1 - c.rank();
    Connection& connection = c.connection(peer);
    int violations = 0;
    for (std::uint64_t n = 1; n <= kRounds; ++n) {
      // Both ranks send, then read: the ping of one is the pong of the other.
      for (std::size_t offset : {64U, 1024U, 8192U}) *memory.words(32768 + offset) = n;
      connection.put({memory.of(peer), 64, memory.mine(), 32768 + 64, 8});
      connection.put({memory.of(peer), 1024, memory.mine(), 32768 + 1024, 8});
      if (n % 2 == 0) {
        connection.put({memory.of(peer), 8192, memory.mine(), 32768 + 8192, 8});
        connection.signal({memory.of(peer), 0, n});
      } else {
        connection.put_with_signal({memory.of(peer), 8192, memory.mine(), 32768 + 8192, 8},
                                   {memory.of(peer), 0, n});
      }
      connection.flush(soon());
      memory.await(0, n);
      if (testing::Test::HasFatalFailure()) return;
      for (std::size_t offset : {64U, 1024U, 8192U})
        if (*memory.words(offset) != n) ++violations;
      connection.signal({memory.of(peer), 8, n});  // read
      memory.await(8, n);
    }
    EXPECT_EQ(violations, 0);
  });
}

TEST_P(Wires, FlushMeansThatItIsThere) {
  on(2, [](Communicator& c) {
    const SharedMemory memory(c, GetParam(), 1 << 20);
    if (c.rank() == 0) {
      for (std::uint64_t i = 0; i < (1 << 19) / 8; ++i) *memory.words(i * 8) = pattern(1, i);
      c.connection(1).put({memory.of(1), 1 << 19, memory.mine(), 0, 1 << 19});
      c.connection(1).flush(soon());
    }
    c.barrier();  // by another way
    std::uint64_t wrong = 0;
    for (std::uint64_t i = 0; c.rank() == 1 && i < (1 << 19) / 8; ++i)
      wrong += *memory.words((1 << 19) + i * 8) != pattern(1, i) ? 1 : 0;
    EXPECT_EQ(wrong, 0U);
  });
}

TEST_P(Wires, AddsOfManyThreadsAndRanksAreAllThere) {
  on(3, [](Communicator& c) {
    constexpr int kThreads = 4, kAdds = 500;
    const SharedMemory memory(c, GetParam(), 4096);
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t)
      threads.emplace_back([&, t] {
        for (int i = 0; i < kAdds; ++i)
          c.connection(2).atomic_add({memory.of(2), 8, t % 2 == 0 ? 3 : -1});
        c.connection(2).flush(soon());
      });
    for (std::thread& thread : threads) thread.join();
    c.barrier();
    if (c.rank() != 2) return;
    EXPECT_EQ(static_cast<std::int64_t>(memory.acquire(8)), 3 * kThreads / 2 * kAdds * 2);
  });
}

TEST_P(Wires, AddsWrapAsSignedNumbersDo) {
  on(2, [](Communicator& c) {
    const SharedMemory memory(c, GetParam(), 4096);
    *memory.words(16) = static_cast<std::uint64_t>(INT64_MAX);
    *memory.words(24) = static_cast<std::uint64_t>(INT64_MIN);
    c.barrier();
    if (c.rank() == 0) {
      Connection& connection = c.connection(1);
      connection.atomic_add({memory.of(1), 16, 1});
      connection.atomic_add({memory.of(1), 24, -1});
      connection.atomic_add({memory.of(1), 32, -5});
      connection.atomic_add({memory.of(1), 40, INT64_MIN});
      connection.atomic_add({memory.of(1), 40, INT64_MIN});
      connection.flush(soon());
    }
    c.barrier();
    if (c.rank() == 0) return;
    EXPECT_EQ(static_cast<std::int64_t>(memory.acquire(16)), INT64_MIN);
    EXPECT_EQ(static_cast<std::int64_t>(memory.acquire(24)), INT64_MAX);
    EXPECT_EQ(static_cast<std::int64_t>(memory.acquire(32)), -5);
    EXPECT_EQ(memory.acquire(40), 0U);
  });
}

TEST_P(Wires, RefusesWhatIsOutOfRangeOrMisaligned) {
  on(2, [](Communicator& c) {
    const SharedMemory memory(c, GetParam(), 4096);
    const int peer = 1 - c.rank();
    Connection& connection = c.connection(peer);
    const Memory &theirs = memory.of(peer), &mine = memory.mine();
    const std::string out = fmt::format("lie outside the memory of rank {}, which has 4096", peer);
    EXPECT_NE(refusal([&] {
                connection.put({theirs, 4090, mine, 0, 8});
              }).find(out),
              std::string::npos);
    EXPECT_NE(refusal([&] {
                connection.put({theirs, 0, mine, 4095, 2});
              }).find("source"),
              std::string::npos);
    EXPECT_NE(refusal([&] {
                connection.put({theirs, ~0ULL, mine, 0, 8});
              }).find("outside"),
              std::string::npos);
    EXPECT_NE(refusal([&] {
                connection.put({mine, 0, mine, 0, 8});
              }).find("not of rank"),
              std::string::npos);
    for (std::uint64_t offset : {1U, 4U, 4089U}) {
      const std::string text =
          fmt::format("destination_offset is {}; it must be a multiple of 8", offset);
      EXPECT_NE(refusal([&] {
                  connection.signal({theirs, offset, 1});
                }).find(text),
                std::string::npos);
      EXPECT_NE(refusal([&] {
                  connection.atomic_add({theirs, offset, 1});
                }).find(text),
                std::string::npos);
      EXPECT_NE(refusal([&] {
                  connection.put_with_signal({theirs, 0, mine, 0, 8}, {theirs, offset, 1});
                }).find(text),
                std::string::npos);
    }
    EXPECT_NE(refusal([&] {
                connection.atomic_add({theirs, 4096, 1});
              }).find("outside"),
              std::string::npos);
    connection.flush(soon());
    c.barrier();
    for (std::size_t i = 0; i < 4096 / 8; ++i) EXPECT_EQ(*memory.words(i * 8), 0U) << i;
  });
}

TEST_P(Wires, OpensOnlyWhatIsMemoryOfThisJob) {
  on(2, [](Communicator& c) {
    const SharedMemory memory(c, GetParam(), 4096);
    const std::string text = memory.mine().serialize();
    std::string damaged = text, other = text, longer = text;
    longer.push_back('x');
    damaged[0] ^= 1;
    other[8] ^= 1;  // the number of the job
    EXPECT_NE(refusal([&] { c.open_memory("x"); }).find("no serialized memory"), std::string::npos);
    EXPECT_NE(refusal([&] { c.open_memory(damaged); }).find("not what"), std::string::npos);
    EXPECT_NE(refusal([&] { c.open_memory(other); }).find("another job"), std::string::npos);
    EXPECT_NE(refusal([&] { c.open_memory(longer); }).find("not what"), std::string::npos);
    EXPECT_NE(refusal([&] { memory.of(1 - c.rank()).serialize(); }, ErrorCode::invalid_usage)
                  .find("was not registered here"),
              std::string::npos);
    EXPECT_NE(refusal([&] { c.register_memory(nullptr, 8); }).find("data is null"),
              std::string::npos);
    std::uint64_t word = 0;
    EXPECT_NE(refusal([&] { c.register_memory(&word, SIZE_MAX); }).find("no room"),
              std::string::npos);
    auto* const odd = reinterpret_cast<std::byte*>(&word) + 4;
    EXPECT_NE(refusal([&] { c.register_memory(odd, 4); }).find("must be a multiple of 8"),
              std::string::npos);
    const Memory again = c.register_memory(&word, sizeof(word));
    c.deregister_memory(again);
    EXPECT_NE(refusal([&] { c.deregister_memory(again); }).find("not any more"), std::string::npos);
  });
}

INSTANTIATE_TEST_SUITE_P(Each, Wires, testing::Values(Wire::loopback, Wire::shm, Wire::ucx),
                         [](const auto& test) { return name_of(test.param); });

TEST(RegisteredMemory, OfAnotherProcessMustBeMadeToBeShared) {
  if (!why_not(Wire::shm).empty()) GTEST_SKIP() << why_not(Wire::shm);
  with_wire(Wire::shm, 2, [](const std::shared_ptr<Communicator>& c) {
    std::vector<std::uint64_t> plain(64);
    const Memory mine = c->register_memory(plain.data(), 512);
    std::vector<std::array<char, 256>> texts(2);
    const std::string text = mine.serialize();
    ASSERT_LE(text.size(), 256U);
    std::memcpy(texts[static_cast<std::size_t>(c->rank())].data(), text.data(), text.size());
    c->all_gather(texts.data(), 256);
    const std::string said = refusal(
        [&] {
          c->open_memory({texts[static_cast<std::size_t>(1 - c->rank())].data(), text.size()});
        },
        ErrorCode::unsupported);
    EXPECT_NE(said.find("allocate_memory"), std::string::npos) << said;
    EXPECT_EQ(c->open_memory(text).data(), mine.data());  // its own
    c->barrier();
  });
}

TEST(RegisteredMemory, OfTheArenaGoesBackWithItsLastUser) {
  with_thread_ranks(1, [](const std::shared_ptr<Communicator>& c) {
    const std::size_t before = c->host_arena().carved();
    for (int i = 0; i < 1000; ++i) {
      Memory memory = c->allocate_memory(1 << 20);
      ASSERT_EQ(reinterpret_cast<std::uintptr_t>(memory.data()) % 4096, 0U);
      const Memory copy = memory;
      c->deregister_memory(memory);
      memory = {};
      ASSERT_GT(c->host_arena().carved(), before);
    }
    EXPECT_EQ(c->host_arena().carved(), before);
  });
}

}  // namespace
}  // namespace expertwire::test
