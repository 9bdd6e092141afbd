#include "expertwire/connection.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "comm/transport/transport.hpp"
#include "expertwire/error.hpp"

namespace expertwire {
namespace {

/// Every transport's connection keeps the same contract; one test a name.
class ConnectionContract : public testing::TestWithParam<const char*> {
 protected:
  ConnectionContract() {
    for (auto& transport : make_transports())
      if (transport->name() == std::string(GetParam()))
        connection_ = transport->connect(Endpoint{}, 1);
  }
  static Memory memory(int rank, std::size_t bytes) {
    return {rank, std::shared_ptr<std::byte>(new std::byte[bytes]{}, [](auto* p) { delete[] p; }),
            bytes};
  }
  template <class Call>
  static std::string message_of(Call call) {
    try {
      call();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
      return error.what();
    }
    return "no error";
  }
  static std::uint64_t& word(const Memory& memory, std::size_t offset) {
    return *reinterpret_cast<std::uint64_t*>(memory.data() + offset);
  }

  std::unique_ptr<Connection> connection_;
  Memory mine_ = memory(0, 4096), theirs_ = memory(1, 4096);
};

TEST_P(ConnectionContract, PutsBytesWhereTheyBelong) {
  for (std::size_t i = 0; i < 100; ++i) mine_.data()[i] = static_cast<std::byte>(i + 1);
  connection_->put({theirs_, 1001, mine_, 3, 50});
  connection_->flush(Deadline::after(std::chrono::seconds(1)));
  EXPECT_EQ(theirs_.data()[1000], std::byte{0});
  for (std::size_t i = 0; i < 50; ++i)
    EXPECT_EQ(theirs_.data()[1001 + i], static_cast<std::byte>(i + 4));
  EXPECT_EQ(theirs_.data()[1051], std::byte{0});
}

TEST_P(ConnectionContract, AtomicAddIsSignedAndNothingIsLost) {
  constexpr int kThreads = 4, kAdds = 5000;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < kAdds; ++i) connection_->atomic_add({theirs_, 8, t % 2 == 0 ? 3 : -1});
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(static_cast<std::int64_t>(word(theirs_, 8)), kThreads / 2 * kAdds * 2);
  connection_->atomic_add({theirs_, 16, -5});
  EXPECT_EQ(static_cast<std::int64_t>(word(theirs_, 16)), -5);
}

TEST_P(ConnectionContract, SignalIsSeenAfterThePutsBeforeIt) {
  constexpr std::uint64_t kRounds = 20000;
  std::atomic<std::uint64_t> done{0};
  std::atomic<int> violations{0};
  std::thread reader([&] {
    for (std::uint64_t n = 1; n <= kRounds; ++n) {
      while (std::atomic_ref(word(theirs_, 0)).load(std::memory_order_acquire) < n)
        std::this_thread::yield();
      for (std::size_t offset : {64U, 1024U, 4088U})
        if (word(theirs_, offset) != n) ++violations;
      done.store(n, std::memory_order_release);
    }
  });
  for (std::uint64_t n = 1; n <= kRounds; ++n) {
    for (std::size_t offset : {64U, 1024U, 4088U}) word(mine_, offset) = n;
    connection_->put({theirs_, 64, mine_, 64, 8});
    connection_->put({theirs_, 1024, mine_, 1024, 8});
    if (n % 2 == 0) {
      connection_->put({theirs_, 4088, mine_, 4088, 8});
      connection_->signal({theirs_, 0, n});
    } else {
      connection_->put_with_signal({theirs_, 4088, mine_, 4088, 8}, {theirs_, 0, n});
    }
    while (done.load(std::memory_order_acquire) < n) std::this_thread::yield();
  }
  reader.join();
  EXPECT_EQ(violations, 0);
}

TEST_P(ConnectionContract, RefusesWhatIsOutOfRange) {
  EXPECT_NE(message_of([&] {
              connection_->put({theirs_, 4090, mine_, 0, 8});
            }).find("bytes 4090 to 4098 lie outside the memory of rank 1, which has 4096"),
            std::string::npos);
  EXPECT_NE(message_of([&] {
              connection_->put({theirs_, 0, mine_, 4095, 2});
            }).find("source"),
            std::string::npos);
  EXPECT_NE(message_of([&] {
              connection_->put({theirs_, ~0ULL, mine_, 0, 8});
            }).find("outside"),
            std::string::npos);
  EXPECT_NE(message_of([&] {
              connection_->put({mine_, 0, mine_, 0, 8});
            }).find("not of rank 1"),
            std::string::npos);
  EXPECT_NE(message_of([&] {
              connection_->signal({theirs_, 4, 1});
            }).find("destination_offset is 4; it must be a multiple of 8"),
            std::string::npos);
  EXPECT_NE(message_of([&] {
              connection_->atomic_add({theirs_, 4096, 1});
            }).find("outside"),
            std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(Transports, ConnectionContract, testing::Values("loopback", "shm"),
                         [](const auto& test) { return std::string(test.param); });

}  // namespace
}  // namespace expertwire
