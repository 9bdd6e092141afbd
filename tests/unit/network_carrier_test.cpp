#include "comm/proxy/network_carrier.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <list>
#include <random>
#include <vector>

namespace expertwire {
namespace {

constexpr std::uint64_t kJob = 0x1234567890ABCDEF;

/// Keeps messages until the test delivers them, in whatever order it likes.
class FakeEngine final : public Engine {
 public:
  struct Message {
    std::vector<std::byte> bytes;
    void* token;
  };
  explicit FakeEngine(std::size_t message_bytes) : message_bytes_(message_bytes) {}

  const std::string& address() const override { return address_; }
  std::size_t message_bytes() const override { return message_bytes_; }
  void set_client(Client* client) override { client_ = client; }
  void set_address(int, std::string) override {}
  void send(int peer, const Piece* pieces, int count, void* token) override {
    EXPECT_LE(count, kMostPieces);
    Message message{{}, token};
    for (int i = 0; i < count; ++i) {
      const auto* data = static_cast<const std::byte*>(pieces[i].data);
      message.bytes.insert(message.bytes.end(), data, data + pieces[i].bytes);
    }
    under_way.push_back(std::move(message));
    if (gives_back) client_->sent(peer, token);
  }
  bool writes_remotely(int) override { return remote; }
  void put(int, const Piece& piece, std::uint64_t address, const std::string& key,
           void* token) override {
    EXPECT_EQ(key, "key");
    puts.push_back({piece, address, token});
  }
  void flush(int, void* token) override { flushes.push_back(token); }
  /// What was put arrives, and its sender hears of it.
  void write_all() {
    for (const Put& put : std::exchange(puts, {})) {
      std::memcpy(reinterpret_cast<void*>(put.address), put.piece.data, put.piece.bytes);
      client_->sent(1, put.token);
    }
  }
  void end_flushes() {
    for (void* token : std::exchange(flushes, {})) client_->sent(1, token);
  }
  bool progress() override { return false; }
  void drop(int) noexcept override { dropped = true; }

  struct Put {
    Piece piece;
    std::uint64_t address;
    void* token;
  };
  std::list<Message> under_way;
  std::vector<Put> puts;
  std::vector<void*> flushes;
  bool remote = false;
  bool gives_back = true, dropped = false;

 private:
  std::string address_;
  std::size_t message_bytes_;
  Client* client_ = nullptr;
};

/// A rank with one peer behind the fake engine.
struct Side {
  Side(int rank, std::size_t message_bytes, bool may_write = false)
      : engine(message_bytes), setting(std::make_shared<NetworkSetting>()), client(setting) {
    setting->job = kJob;
    setting->rank = rank;
    setting->memories = &memories;
    setting->most_in_flight = std::size_t{1} << 30;
    setting->lost = [this](int peer, const std::string& text, bool left) {
      lost_peer = peer, why = text, in_good_order = left;
    };
    engine.set_client(&client);
    carrier = std::make_unique<NetworkCarrier>(1 - rank, engine, setting, may_write);
    client.add(1 - rank, carrier.get());
    // Memory 0 is this rank's, memory 1 is the peer's memory 0.
    auto pointer = [](std::uint64_t* p) {
      return std::shared_ptr<std::byte>(reinterpret_cast<std::byte*>(p), [](std::byte*) {});
    };
    memories.set(memories.reserve(), Memory(rank, pointer(words.data()), sizeof(words)), 0);
    memories.set(memories.reserve(), Memory(1 - rank, nullptr, sizeof(words)), 0);
  }
  void put(std::uint64_t to, const std::uint64_t* from, std::uint64_t bytes,
           std::uint32_t memory = 1) {
    Cargo cargo;
    cargo.operation = Operation::put;
    cargo.source = reinterpret_cast<const std::byte*>(from);
    cargo.destination = memories.find(memory);
    cargo.offset = to;
    cargo.bytes = bytes;
    carrier->carry(cargo);
  }
  void word(Operation operation, std::uint64_t to, std::int64_t value) {
    Cargo cargo;
    cargo.operation = operation;
    cargo.destination = memories.find(1);
    cargo.offset = to;
    cargo.value = value;
    carrier->carry(cargo);
  }
  void progress() {
    while (carrier->progress()) {
    }
  }

  alignas(64) std::array<std::uint64_t, 1024> words{};
  MemoryTable memories;
  FakeEngine engine;
  std::shared_ptr<NetworkSetting> setting;
  NetworkClient client;
  std::unique_ptr<NetworkCarrier> carrier;
  int lost_peer = -1;
  std::string why;
  bool in_good_order = false;
};

void deliver(Side& from, Side& to, std::list<FakeEngine::Message>::iterator message) {
  to.client.received(message->bytes.data(), message->bytes.size());
  from.engine.under_way.erase(message);
}
void deliver_all(Side& from, Side& to) {
  while (!from.engine.under_way.empty()) deliver(from, to, from.engine.under_way.begin());
}

TEST(NetworkCarrier, WordsWaitForPutsInWhateverOrderMessagesCome) {
  std::uint64_t overtaken = 0;
  for (unsigned seed = 1; seed <= 40; ++seed) {
    std::mt19937 random(seed);
    Side a(0, 64), b(1, 64);  // a message holds eight words
    std::array<std::uint64_t, 512> source{};
    constexpr std::uint64_t kPuts = 256;
    std::int64_t added = 0;
    for (std::uint64_t n = 1; n <= kPuts; ++n) {
      source[n] = n;
      a.put((8 + n) * 8, &source[n], 8);
      if (random() % 3 == 0) a.word(Operation::store, 0, static_cast<std::int64_t>(n));
      if (random() % 5 == 0)
        a.word(Operation::atomic_add, 8, n % 2 == 0 ? -7 : 3), added += n % 2 == 0 ? -7 : 3;
      if (random() % 7 == 0) a.progress();
    }
    a.word(Operation::store, 0, kPuts);
    a.progress();
    ASSERT_GT(a.engine.under_way.size(), 20U);
    while (!a.engine.under_way.empty()) {
      auto it = a.engine.under_way.begin();
      std::advance(it, static_cast<long>(random() % a.engine.under_way.size()));
      overtaken += it != a.engine.under_way.begin() ? 1 : 0;
      const std::uint64_t before = b.words[0];
      deliver(a, b, it);
      ASSERT_GE(b.words[0], before);
      for (std::uint64_t n = 1; n <= b.words[0]; ++n)
        ASSERT_EQ(b.words[8 + n], n) << "seed " << seed;
    }
    EXPECT_EQ(b.words[0], kPuts);
    EXPECT_EQ(static_cast<std::int64_t>(b.words[1]), added);
    EXPECT_EQ(b.lost_peer, -1) << b.why;
  }
  EXPECT_GT(overtaken, 1000U);
}

TEST(NetworkCarrier, FlushWaitsForEverythingBeforeIt) {
  Side a(0, 64), b(1, 64);
  std::array<std::uint64_t, 64> source{};
  std::uint64_t mark = 0;
  a.put(64, source.data(), 512);
  a.carrier->flush({&mark, 5});
  a.progress();
  ASSERT_GT(a.engine.under_way.size(), 7U);
  while (a.engine.under_way.size() > 1) deliver(a, b, std::prev(a.engine.under_way.end()));
  b.progress();
  deliver_all(b, a);
  EXPECT_EQ(mark, 0U);  // the first has not come
  deliver_all(a, b);
  b.progress();
  ASSERT_FALSE(b.engine.under_way.empty()) << "nobody answers";
  deliver_all(b, a);
  EXPECT_EQ(mark, 5U);
  a.carrier->flush({&mark, 6});  // nothing is under way
  a.progress();
  EXPECT_EQ(mark, 6U);
}

TEST(NetworkCarrier, RecordsForOnePeerAreMerged) {
  Side a(0, 4096), b(1, 4096);
  std::array<std::uint64_t, 512> source{};
  for (std::size_t i = 0; i < source.size(); ++i) source[i] = i + 1;
  for (std::uint64_t i = 0; i < 10; ++i) a.put(64 + i * 24, &source[i * 3], 24);
  a.word(Operation::store, 0, 1);
  a.progress();
  EXPECT_EQ(a.engine.under_way.size(), 1U);
  deliver_all(a, b);
  for (std::uint64_t i = 0; i < 30; ++i) EXPECT_EQ(b.words[8 + i], i + 1);
  EXPECT_EQ(b.words[0], 1U);
  a.put(64, source.data(), 2500);  // not copied, and cut at the end of a message
  a.put(64 + 2504, source.data(), 1504);
  a.put(64 + 4096, source.data(), 8);
  a.progress();
  EXPECT_EQ(a.engine.under_way.size(), 1U);
  deliver_all(a, b);
  EXPECT_EQ(b.words[8 + 313 + 187], 188U);
}

TEST(NetworkCarrier, BytesUnderWayAreCapped) {
  Side a(0, 1024);
  a.setting->most_in_flight = 5000;
  a.engine.gives_back = false;
  std::array<std::uint64_t, 1024> source{};
  for (int i = 0; i < 20; ++i) a.put(0, source.data(), 8192);
  a.progress();
  EXPECT_LE(a.setting->in_flight, 5000U + 1024 + 2000);
  EXPECT_LE(a.engine.under_way.size(), 5U);
  EXPECT_FALSE(a.carrier->idle());
  std::size_t messages = 0;
  while (!a.engine.under_way.empty()) {
    ++messages;
    void* const token = a.engine.under_way.front().token;
    a.engine.under_way.pop_front();
    a.carrier->sent(token);
    a.progress();
  }
  EXPECT_EQ(messages, 160U);
  EXPECT_EQ(a.setting->in_flight, 0U);
  EXPECT_TRUE(a.carrier->idle());
}

/// A message as a sender would make it, to be damaged.
struct Forged {
  MessageHead head{kJob, 1, 0, 0, MessageKind::records, 1, 0};
  MessageRecord record{64, 8, 0, Operation::put};
  std::vector<std::byte> data = std::vector<std::byte>(8, std::byte{0xEE});

  std::vector<std::byte> bytes() const {
    std::vector<std::byte> all(sizeof(head) + sizeof(record) + data.size());
    std::memcpy(all.data(), &head, sizeof(head));
    std::memcpy(all.data() + sizeof(head), &record, sizeof(record));
    std::memcpy(all.data() + sizeof(head) + sizeof(record), data.data(), data.size());
    return all;
  }
};

TEST(NetworkCarrier, RefusesEveryMessageThatMakesNoSense) {
  struct Case {
    const char* said;
    std::function<void(Forged&)> damage;
  };
  const std::vector<Case> cases = {
      {"few for 2 records", [](Forged& f) { f.head.records = 2, f.data.clear(); }},
      {"few for 65 records", [](Forged& f) { f.head.records = 65, f.data.resize(4096); }},
      {"memory 7 is not registered", [](Forged& f) { f.record.memory = 7; }},
      {"memory 1 is not registered", [](Forged& f) { f.record.memory = 1; }},
      {"memory 4294967295", [](Forged& f) { f.record.memory = UINT32_MAX; }},
      {"lie outside", [](Forged& f) { f.record.offset = 8192 - 7; }},
      {"lie outside", [](Forged& f) { f.record.offset = ~0ULL; }},
      {"lie outside", [](Forged& f) { f.record.value = ~0ULL; }},
      {"a put of 16 bytes brings 8", [](Forged& f) { f.record.value = 16; }},
      {"4 bytes belong to no record", [](Forged& f) { f.record.value = 4; }},
      {"not 8-byte aligned",
       [](Forged& f) {
         f.record.operation = Operation::store, f.record.offset = 4, f.data.clear();
       }},
      {"no operation 99", [](Forged& f) { f.record.operation = static_cast<Operation>(99); }},
      {"no operation 2", [](Forged& f) { f.record.operation = Operation::signal; }},
      {"number 0 cannot be", [](Forged& f) { f.head.sequence = 0; }},
      {"confirms message 3, of 0", [](Forged& f) { f.head.applied = 3; }},
  };
  for (const Case& c : cases) {
    Side b(1, 4096);
    Forged forged;
    c.damage(forged);
    const auto bytes = forged.bytes();
    b.client.received(bytes.data(), bytes.size());
    b.progress();
    EXPECT_EQ(b.lost_peer, 0) << c.said;
    EXPECT_NE(b.why.find(c.said), std::string::npos) << b.why;
    EXPECT_NE(b.why.find("rank 0"), std::string::npos) << b.why;
    EXPECT_FALSE(b.in_good_order);
    EXPECT_TRUE(b.engine.dropped);
    if (c.said == std::string("number 0 cannot be")) continue;  // found when bytes are placed
    EXPECT_TRUE(std::all_of(b.words.begin(), b.words.end(), [](auto w) { return w == 0; }))
        << c.said;
  }
  Side b(1, 4096);
  const auto good = Forged().bytes();
  b.client.received(good.data(), good.size());
  b.progress();
  EXPECT_EQ(b.lost_peer, -1) << b.why;
  EXPECT_EQ(b.words[8], 0xEEEEEEEEEEEEEEEEULL);
  b.client.received(good.data(), good.size());  // it came before
  b.progress();
  EXPECT_EQ(b.lost_peer, 0);
}

TEST(NetworkCarrier, StrangersAreDroppedAndCounted) {
  Side b(1, 4096);
  Forged other_job, other_rank;
  other_job.head.job ^= 1;
  other_rank.head.source = 5;
  for (const auto& bytes : {other_job.bytes(), other_rank.bytes(), std::vector<std::byte>(10)})
    b.client.received(bytes.data(), bytes.size());
  b.client.received(nullptr, 0);
  b.progress();
  EXPECT_EQ(b.client.strangers(), 4U);
  EXPECT_EQ(b.lost_peer, -1);
  EXPECT_EQ(b.words[8], 0U);
}

TEST(NetworkCarrier, SilenceIsDeathUnlessItWasThisProcessThatStood) {
  using std::chrono::milliseconds;
  Side a(0, 4096);
  a.setting->silence = milliseconds(500);
  auto now = Carrier::Clock::now();
  a.carrier->tick(now);
  EXPECT_TRUE(a.engine.under_way.empty());  // nobody has anything to do with the peer
  a.carrier->expect();
  a.carrier->tick(now);
  now = Carrier::Clock::now();
  for (int i = 0; i < 40; ++i) a.carrier->tick(now += milliseconds(10));
  EXPECT_EQ(a.lost_peer, -1);
  EXPECT_FALSE(a.engine.under_way.empty());  // signs of life
  a.carrier->tick(now += milliseconds(5000));
  EXPECT_EQ(a.lost_peer, -1) << a.why;
  for (int i = 0; i < 20; ++i) a.carrier->tick(now += milliseconds(10));
  EXPECT_EQ(a.lost_peer, 1);
  EXPECT_NE(a.why.find("nothing was heard of rank 1 for 500 ms"), std::string::npos) << a.why;
  EXPECT_TRUE(a.engine.dropped);
}

TEST(NetworkCarrier, GoodbyeCountsOnceEverythingBeforeItHasCome) {
  Side a(0, 64), b(1, 64);
  std::array<std::uint64_t, 64> source{};
  a.put(64, source.data(), 200);
  a.word(Operation::store, 0, 9);
  a.progress();
  a.carrier->say_goodbye();
  deliver(a, b, std::prev(a.engine.under_way.end()));
  b.progress();
  EXPECT_EQ(b.lost_peer, -1);
  deliver_all(a, b);
  b.progress();
  EXPECT_EQ(b.words[0], 9U);
  EXPECT_EQ(b.lost_peer, 0);
  EXPECT_TRUE(b.in_good_order);
}

TEST(NetworkCarrier, WordsWaitForTheFlushOfRemoteWrites) {
  Side a(0, 4096, true), b(1, 4096);
  a.engine.remote = true;
  const std::uint32_t open = a.memories.reserve();  // the peer's memory, with a key
  a.memories.set(open, Memory(1, nullptr, sizeof(b.words)), 0, "key",
                 reinterpret_cast<std::uint64_t>(b.words.data()));
  std::vector<std::uint64_t> source(40000);
  for (std::size_t i = 0; i < source.size(); ++i) source[i] = i + 1;
  a.put(64, source.data(), 4000, open);
  a.put(512 * 8, &source[7], 8);  // without a key: by message
  a.word(Operation::store, 0, 5);
  a.progress();
  ASSERT_EQ(a.engine.puts.size(), 1U);
  ASSERT_EQ(a.engine.flushes.size(), 1U);
  ASSERT_EQ(a.engine.under_way.size(), 1U);
  deliver_all(a, b);
  EXPECT_EQ(b.words[512], 8U);
  EXPECT_EQ(b.words[0], 0U) << "a word overtook a put";
  EXPECT_FALSE(a.carrier->idle());
  a.engine.write_all();
  a.progress();
  EXPECT_TRUE(a.engine.under_way.empty());  // written, for all that the sender knows not there
  a.engine.end_flushes();
  a.progress();
  deliver_all(a, b);
  EXPECT_EQ(b.words[0], 5U);
  for (std::size_t i = 0; i < 500; ++i) ASSERT_EQ(b.words[8 + i], i + 1);
  EXPECT_TRUE(a.carrier->idle());

  a.put(0, source.data(), 0, open);  // nothing: no write, no flush
  a.word(Operation::atomic_add, 0, 2);
  a.progress();
  EXPECT_TRUE(a.engine.puts.empty());
  EXPECT_TRUE(a.engine.flushes.empty());
  deliver_all(a, b);
  EXPECT_EQ(b.words[0], 7U);
}

TEST(NetworkCarrier, VersionsThatDifferMeanMessages) {
  Side a(0, 4096, false), b(1, 4096);
  a.engine.remote = true;
  const std::uint32_t open = a.memories.reserve();
  a.memories.set(open, Memory(1, nullptr, sizeof(b.words)), 0, "key",
                 reinterpret_cast<std::uint64_t>(b.words.data()));
  const std::uint64_t value = 77;
  a.put(64, &value, 8, open);
  a.progress();
  EXPECT_TRUE(a.engine.puts.empty());
  deliver_all(a, b);
  EXPECT_EQ(b.words[8], 77U);
}

TEST(NetworkCarrier, NothingIsSentToAPeerThatIsLost) {
  Side a(0, 4096);
  std::uint64_t mark = 0;
  a.client.lost(1, "Connection reset");
  EXPECT_EQ(a.lost_peer, 1);
  EXPECT_NE(a.why.find("the way to rank 1 broke: Connection reset"), std::string::npos);
  a.word(Operation::store, 0, 1);
  a.carrier->flush({&mark, 1});
  a.carrier->say_goodbye();
  a.progress();
  EXPECT_TRUE(a.engine.under_way.empty());
  EXPECT_TRUE(a.carrier->has_room());
  EXPECT_TRUE(a.carrier->idle());
  EXPECT_EQ(mark, 0U);
}

}  // namespace
}  // namespace expertwire
