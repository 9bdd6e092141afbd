// Proxies by themselves: queues that are full, carriers that fail, triggers that make no sense, and
// what idle ones do.

#include "comm/proxy/proxies.hpp"

#include <gtest/gtest.h>

#include "comm/communicator_access.hpp"
#include "expertwire/port_channel.hpp"
#include "ranks/wires.hpp"

namespace expertwire::test {
namespace {

/// Counts what it carries, unless it is stuck or told to throw.
class FakeCarrier final : public Carrier {
 public:
  bool has_room() const override { return !stuck.load(); }
  void carry(const Cargo& cargo) override {
    if (throws.load()) throw Error(ErrorCode::system, "the fake carrier was told to");
    sum += cargo.value;
    ++carried;
  }
  void flush(const FlushMark& mark) override {
    std::atomic_ref(*mark.word).store(mark.value, std::memory_order_release);
  }

  std::atomic<bool> stuck{false}, throws{false};
  std::atomic<std::int64_t> sum{0};
  std::atomic<std::uint64_t> carried{0};
};

class ProxyAlone : public testing::Test {
 protected:
  std::unique_ptr<Proxies> make(int count) {
    Proxies::Setting setting;
    setting.communicator = communicator_.get();
    setting.memories = &CommunicatorAccess::memories(*communicator_);
    setting.count = count;
    setting.mapped = [this](int) {
      auto made = std::make_unique<FakeCarrier>();
      carrier_ = made.get();
      return made;
    };
    return std::make_unique<Proxies>(std::move(setting));
  }
  WaitContext context(int ms) {
    return {communicator_.get(), Deadline::after(std::chrono::milliseconds(ms)), "the test", 0};
  }
  static Trigger add(std::int64_t value) {
    Trigger trigger;
    trigger.operation = Operation::atomic_add;
    trigger.destination = 0;  // this rank's arena
    trigger.value = value;
    return trigger;
  }
  template <class Ready>
  static bool comes(Ready ready) {
    const Deadline deadline = Deadline::after(std::chrono::seconds(20));
    while (!ready()) {
      if (deadline.expired()) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return true;
  }

  std::shared_ptr<Communicator> communicator_ =
      Communicator::create(bootstrap_in_process(1).front(), small_arena());
  FakeCarrier* carrier_ = nullptr;
};

TEST_F(ProxyAlone, AFullQueueEndsAtItsDeadlineAndLosesNothing) {
  auto proxies = make(1);
  carrier_->stuck = true;
  std::int64_t pushed = 0;
  std::string said;
  for (int i = 0; i < 5000 && said.empty(); ++i) try {
      proxies->push(proxies->connection(0), add(pushed + 1), context(50));
      ++pushed;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::timeout);
      EXPECT_EQ(error.peer(), 0);
      EXPECT_EQ(error.phase(), Phase::channel);
      said = error.what();
    }
  EXPECT_NE(said.find("the test waited 50 ms for rank 0"), std::string::npos) << said;
  EXPECT_EQ(pushed, static_cast<std::int64_t>(Fifo::kUsualCapacity));
  carrier_->stuck = false;
  proxies->flush(proxies->connection(0), context(20000));
  EXPECT_EQ(carrier_->sum, pushed * (pushed + 1) / 2);
  proxies->push(proxies->connection(0), add(1), context(50));
}

TEST_F(ProxyAlone, WhatACarrierThrowsIsAnErrorOfTheJobAndNotTheEndOfTheProcess) {
  auto proxies = make(1);
  carrier_->throws = true;
  proxies->push(proxies->connection(0), add(1), context(1000));
  ASSERT_TRUE(comes([&] { return proxies->failure().has_value(); }));
  EXPECT_NE(std::string(proxies->failure()->what()).find("the fake carrier was told to"),
            std::string::npos);
}

TEST_F(ProxyAlone, TriggersThatMakeNoSenseAreRefusedByName) {
  auto proxies = make(1);
  ChannelState& channel = proxies->connection(0);
  const auto refused = [&](const Trigger& trigger) {
    ChannelState& fresh = proxies->channels().make(0);
    proxies->push(fresh, trigger, context(1000));
    return refusal([&] { proxies->flush(fresh, context(10000)); });
  };
  Trigger trigger = add(1);
  trigger.destination = 4711;
  EXPECT_NE(refused(trigger).find("destination 4711 is no memory of that rank"), std::string::npos);
  trigger = add(1);
  trigger.destination_offset = 4;
  EXPECT_NE(refused(trigger).find("no multiple of 8"), std::string::npos);
  trigger.destination_offset = ~7ULL;
  EXPECT_NE(refused(trigger).find("outside"), std::string::npos);
  trigger = add(1);
  trigger.operation = static_cast<Operation>(99);
  EXPECT_NE(refused(trigger).find("no operation 99"), std::string::npos);
  trigger.operation = Operation::put;
  trigger.bytes = ~0ULL;
  EXPECT_NE(refused(trigger).find("outside"), std::string::npos);
  trigger.bytes = 8;
  trigger.source = 12345;
  EXPECT_NE(refused(trigger).find("source 12345"), std::string::npos);
  EXPECT_EQ(carrier_->carried, 0U);
  proxies->push(channel, add(5), context(1000));
  proxies->flush(channel, context(10000));  // other channels go on
  EXPECT_EQ(carrier_->sum, 5);

  std::uint64_t position = 0;
  Trigger stale = add(1);
  stale.channel = 999;
  WaitContext soon = context(1000);
  position = proxies->of(0).push(stale, soon, 0);
  ASSERT_TRUE(comes([&] { return proxies->failure().has_value(); })) << position;
  EXPECT_NE(std::string(proxies->failure()->what()).find("channel 999"), std::string::npos);
}

TEST_F(ProxyAlone, AForkedChildHasAPollerOfItsOwn) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the thread sanitizer ends children that start threads";
#endif
  const auto parents = make(1);
  const ExitCodes codes = run_processes(2, [](std::shared_ptr<Bootstrap> bootstrap) {
    auto c = Communicator::create(std::move(bootstrap), small_arena());
    auto channels = PortChannel::open_all(c);
    const auto peer = static_cast<std::size_t>(1 - c->rank());
    std::this_thread::sleep_for(std::chrono::milliseconds(1200));  // until proxies sleep
    channels[peer].signal();
    channels[peer].wait(std::chrono::milliseconds(10000));
    c->barrier();
    return 0;
  });
  EXPECT_EQ(codes, (ExitCodes{0, 0}));
}

TEST_F(ProxyAlone, IdleOnesShareOnePollerAndWakeAgain) {
  std::vector<std::unique_ptr<Proxies>> sets;
  std::vector<FakeCarrier*> carriers;
  for (int i = 0; i < 3; ++i) {
    sets.push_back(make(2));
    carriers.push_back(carrier_);
  }
  const auto poller = Poller::get();
  ASSERT_TRUE(comes([&] { return poller->clients() == 6; }));
  for (int round = 1; round <= 2; ++round) {
    for (std::size_t i = 0; i < 3; ++i) {
      sets[i]->push(sets[i]->connection(0), add(10), context(1000));
      ASSERT_TRUE(comes([&] { return carriers[i]->sum == 10 * round; }));
      EXPECT_TRUE(comes([&] { return !sets[i]->of(0).parked(); }));
    }
    ASSERT_TRUE(comes([&] { return poller->clients() == 6; }));
  }
}

TEST(Copier, WhatCudaRefusesIsSaidOnceAndEndsNothing) {
  if (cuda_device_count() > 0) GTEST_SKIP() << "there is a GPU here, which refuses nothing";
  std::atomic<int> said{0};
  std::shared_ptr<Copier> copier;
  try {
    copier = std::make_shared<Copier>(0, [&](const std::string&) { ++said; });
  } catch (const Error& error) {
    GTEST_SKIP() << error.what();  // a build without CUDA
  }
  DeviceCarrier carrier(copier);
  std::uint64_t word = 0, source = 5, mark = 0;
  const MemoryTable::Entry host{0, MemoryKind::host, reinterpret_cast<std::byte*>(&word), 8, 0, {},
                                0};
  MemoryTable::Entry device = host;
  device.kind = MemoryKind::cuda;
  Cargo put;
  put.operation = Operation::put;
  put.source = reinterpret_cast<const std::byte*>(&source);
  put.bytes = 8;
  put.destination = &host;
  carrier.carry(put);
  carrier.flush({&mark, 1});
  EXPECT_EQ(word, 5U);  // of host memory: at once
  EXPECT_EQ(mark, 1U);
  put.destination = &device;
  for (int i = 0; i < 3; ++i) carrier.carry(put);
  carrier.flush({&mark, 2});
  const Deadline deadline = soon();
  while (!carrier.idle() && !deadline.expired()) std::this_thread::yield();
  EXPECT_TRUE(carrier.idle());
  EXPECT_EQ(said, 1);
  EXPECT_EQ(std::atomic_ref(mark).load(), 1U);  // nothing is claimed to have arrived
}

}  // namespace
}  // namespace expertwire::test
