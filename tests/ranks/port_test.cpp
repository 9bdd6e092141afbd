// Port channels on every wire: what proxies carry arrives, in order, once.

#include "expertwire/port_channel.hpp"

#include "base/env.hpp"
#include "comm/communicator_access.hpp"
#include "comm/proxy/proxies.hpp"
#include "ranks/streams.hpp"
#include "ranks/wires.hpp"

namespace expertwire::test {
namespace {

class Ports : public testing::TestWithParam<Wire> {
 protected:
  void SetUp() override {
    if (!why_not(GetParam()).empty()) GTEST_SKIP() << why_not(GetParam());
  }
  void on(int ranks, const std::function<void(const std::shared_ptr<Communicator>&)>& body) {
    with_wire(GetParam(), ranks, body);
  }
};

TEST_P(Ports, AddsOfManyProducersAmongPuts) {
  on(2, [](const std::shared_ptr<Communicator>& c) {
    constexpr int kProducers = 64, kAdds = 50;
    const SharedMemory memory(*c, GetParam(), 1 << 20);
    auto channels = PortChannel::open_all(c);
    const int peer = 1 - c->rank();
    PortChannel& channel = channels[static_cast<std::size_t>(peer)];
    for (std::size_t i = 0; i < 4096; ++i) *memory.words((1 << 19) + i * 8) = pattern(7, i);
    std::vector<std::thread> producers;
    for (std::size_t p = 0; p < kProducers; ++p)
      producers.emplace_back([&, p] {
        for (int i = 0; i < kAdds; ++i) {
          channel.atomic_add({memory.of(peer), 0, p % 3 == 0 ? -7 : 5});
          if (i % 10 == 3)
            channel.put({memory.of(peer), 4096 + p * 64, memory.mine(), (1 << 19) + p * 64, 64});
          if (i % 25 == 7) channel.atomic_add({memory.of(peer), 8, -1});
        }
      });
    for (std::thread& producer : producers) producer.join();
    channel.flush(kLong);
    c->barrier();
    EXPECT_EQ(static_cast<std::int64_t>(memory.acquire(0)), (22 * -7 + 42 * 5) * kAdds);
    EXPECT_EQ(static_cast<std::int64_t>(memory.acquire(8)), -2 * kProducers);
    for (std::size_t i = 0; i < kProducers * 8; ++i)
      ASSERT_EQ(*memory.words(4096 + i * 8), pattern(7, i)) << i;
    c->barrier();
  });
}

TEST_P(Ports, DataIsThereBeforeItsSignal) {
  on(2, [](const std::shared_ptr<Communicator>& c) {
    const SharedMemory memory(*c, GetParam(), std::size_t{8} * ((1 << 20) + 128) + 4096);
    auto channels = PortChannel::open_all(c);
    PortChannel& channel = channels[static_cast<std::size_t>(1 - c->rank())];
    const std::uint64_t many = GetParam() == Wire::loopback ? 20000 : 4000;
    for (const auto& [bytes, messages] :
         std::vector<std::pair<std::size_t, std::uint64_t>>{{8, many},
                                                            {1, 500},
                                                            {13, many / 4},
                                                            {4099, many / 8},
                                                            {14336, many / 8},
                                                            {57344 + 3, 300},
                                                            {(1 << 20) + 1, 40}}) {
      EXPECT_EQ(stream_to_rank_1(*c, memory, channel, bytes, messages), 0U) << bytes;
      c->barrier();
    }
  });
}

TEST_P(Ports, MovesMessagesOf64Megabytes) {
  on(2, [](const std::shared_ptr<Communicator>& c) {
    constexpr std::size_t kBytes = (64 << 20) - 5;
    const SharedMemory memory(*c, GetParam(), kBytes + 64);
    auto channels = PortChannel::open_all(c);
    PortChannel& channel = channels[static_cast<std::size_t>(1 - c->rank())];
    if (c->rank() == 0) {
      fill(memory.mine().data() + 3, kBytes, 64);
      channel.put_with_signal({memory.of(1), 1, memory.mine(), 3, kBytes});
      channel.flush(kLong);
    } else {
      channel.wait(kLong);
      EXPECT_EQ(count_wrong(memory.mine().data() + 1, kBytes, 64), 0U);
      EXPECT_EQ(memory.mine().data()[0], std::byte{0});
      EXPECT_EQ(memory.mine().data()[kBytes + 1], std::byte{0});
    }
  });
}

TEST_P(Ports, PingPongOfThreeRanks) {
  on(3, [](const std::shared_ptr<Communicator>& c) {
    constexpr std::uint64_t kRounds = 500;
    const SharedMemory memory(*c, GetParam(), 4096);
    auto channels = PortChannel::open_all(c);
    std::uint64_t wrong = 0;
    const auto rank = static_cast<std::uint64_t>(c->rank());
    for (std::uint64_t n = 1; n <= kRounds; ++n) {
      for (std::uint64_t peer = 0; peer < 3; ++peer) {
        *memory.words(2048 + peer * 8) = pattern(n, rank * 3 + peer);
        channels[peer].put_with_signal(
            {memory.of(static_cast<int>(peer)), rank * 8, memory.mine(), 2048 + peer * 8, 8});
      }
      for (std::uint64_t peer = 0; peer < 3; ++peer) {
        channels[peer].wait(kLong);
        wrong += *memory.words(peer * 8) != pattern(n, peer * 3 + rank) ? 1 : 0;
        channels[peer].signal();  // read
      }
      for (std::uint64_t peer = 0; peer < 3; ++peer) channels[peer].wait(kLong);
      for (std::uint64_t peer = 0; peer < 3; ++peer) channels[peer].flush(kLong);
    }
    EXPECT_EQ(wrong, 0U);
  });
}

TEST_P(Ports, FlushMeansThatItIsThere) {
  on(2, [](const std::shared_ptr<Communicator>& c) {
    const SharedMemory memory(*c, GetParam(), 4096 + (1 << 20));
    auto channels = PortChannel::open_all(c);
    PortChannel& channel = channels[static_cast<std::size_t>(1 - c->rank())];
    for (std::uint64_t n = 1; n <= 20; ++n) {
      if (c->rank() == 0) {
        *memory.words((1 << 19) + 8) = n;
        channel.put({memory.of(1), 8, memory.mine(), (1 << 19) + 8, 1 << 18});
        channel.atomic_add({memory.of(1), 0, -3});
        channel.flush(kLong);
      }
      c->barrier();  // by another way
      if (c->rank() == 1) {
        EXPECT_EQ(*memory.words(8), n);
        EXPECT_EQ(static_cast<std::int64_t>(memory.acquire(0)), -3 * static_cast<std::int64_t>(n));
      }
      c->barrier();
    }
  });
}

TEST_P(Ports, AreCarriedByWhatTheWireIsToUse) {
  on(2, [](const std::shared_ptr<Communicator>& c) {
    constexpr std::uint64_t kBytes = 100000;
    const SharedMemory memory(*c, GetParam(), 1 << 20);
    auto channels = PortChannel::open_all(c);
    PortChannel& channel = channels[static_cast<std::size_t>(1 - c->rank())];
    const Proxies& proxies = CommunicatorAccess::proxies(*c);
    const Proxies::Sent before = proxies.sent();
    channel.put_with_signal({memory.of(1 - c->rank()), 0, memory.mine(), 1 << 19, kBytes});
    channel.wait(kLong);
    channel.flush(kLong);
    const Proxies::Sent after = proxies.sent();
    const std::uint64_t bytes = after.message_bytes - before.message_bytes;
    if (GetParam() != Wire::ucx) {
      EXPECT_EQ(after.messages, 0U);
    } else if (Env::get().remote_writes == "on") {
      EXPECT_GT(after.writes, before.writes);
      EXPECT_LT(bytes, 1000U);
    } else {
      EXPECT_EQ(after.writes, 0U);
      EXPECT_GE(bytes, kBytes);
      EXPECT_LT(bytes, kBytes * 1.01);
      EXPECT_EQ(after.messages - before.messages, 2U);  // of 56 KB at most; the signal goes with it
    }
    c->barrier();
  });
}

TEST_P(Ports, RefusesWhatCannotBeCarried) {
  on(2, [](const std::shared_ptr<Communicator>& c) {
    const SharedMemory memory(*c, GetParam(), 4096);
    auto channels = PortChannel::open_all(c);
    const int peer = 1 - c->rank();
    PortChannel& channel = channels[static_cast<std::size_t>(peer)];
    const Memory &theirs = memory.of(peer), &mine = memory.mine();
    for (std::uint64_t offset : {1U, 4U, 12U}) {
      const std::string text =
          fmt::format("destination_offset is {}; it must be a multiple of 8", offset);
      EXPECT_NE(refusal([&] {
                  channel.atomic_add({theirs, offset, 1});
                }).find(text),
                std::string::npos);
    }
    EXPECT_NE(refusal([&] {
                channel.put({theirs, 4000, mine, 0, 97});
              }).find("lie outside"),
              std::string::npos);
    EXPECT_NE(refusal([&] {
                channel.put_with_signal({theirs, 0, mine, 4090, 7});
              }).find("source"),
              std::string::npos);
    EXPECT_NE(refusal([&] {
                channel.put({mine, 0, mine, 0, 8});
              }).find("not of rank"),
              std::string::npos);
    std::uint64_t word = 0;
    const Memory plain(peer, {reinterpret_cast<std::byte*>(&word), [](std::byte*) {}}, 8);
    EXPECT_NE(refusal([&] {
                channel.atomic_add({plain, 0, 1});
              }).find("not registered"),
              std::string::npos);
    const PortChannel moved = std::move(channel);
    EXPECT_NE(refusal([&] { channel.signal(); }, ErrorCode::invalid_usage).find("moved from"),
              std::string::npos);
    c->barrier();
    EXPECT_EQ(memory.acquire(0), 0U);
  });
}

TEST_P(Ports, WaitEndsAtItsDeadlineAndNamesThePeer) {
  on(2, [](const std::shared_ptr<Communicator>& c) {
    auto channels = PortChannel::open_all(c);
    PortChannel& channel = channels[static_cast<std::size_t>(1 - c->rank())];
    try {
      channel.wait(std::chrono::milliseconds(50));
      FAIL() << "nobody had signalled";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::timeout) << error.what();
      EXPECT_EQ(error.peer(), 1 - c->rank());
      EXPECT_EQ(error.phase(), Phase::channel);
      EXPECT_NE(std::string(error.what()).find("PortChannel::wait waited 50 ms"),
                std::string::npos);
    }
    c->barrier();
    channel.signal();
    channel.wait(kLong);  // it works as before
    c->barrier();
  });
}

TEST_P(Ports, ManyThatComeAndGoLeaveNothing) {
  on(2, [](const std::shared_ptr<Communicator>& c) {
    Proxies& proxies = CommunicatorAccess::proxies(*c);
    const std::size_t carved = c->host_arena().carved(), channels = proxies.channels().count();
    for (int i = 0; i < 300; ++i) {
      auto some = PortChannel::open_all(c);
      const auto peer = static_cast<std::size_t>(1 - c->rank());
      some[peer].signal();
      some[peer].wait(kLong);
    }
    c->barrier();
    const Deadline deadline = Deadline::after(kLong);
    while ((c->host_arena().carved() > carved || proxies.channels().count() > channels) &&
           !deadline.expired())
      std::this_thread::yield();
    EXPECT_EQ(c->host_arena().carved(), carved);
    EXPECT_EQ(proxies.channels().count(), channels);
    c->barrier();
  });
}

INSTANTIATE_TEST_SUITE_P(Each, Ports, testing::Values(Wire::loopback, Wire::shm, Wire::ucx),
                         [](const auto& test) { return name_of(test.param); });

}  // namespace
}  // namespace expertwire::test
