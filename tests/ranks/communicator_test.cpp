#include "expertwire/communicator.hpp"

#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <thread>

#include "expertwire/memory_channel.hpp"
#include "expertwire/version.hpp"
#include "ranks/entries.hpp"
#include "ranks/processes.hpp"
#include "ranks/thread_ranks.hpp"

namespace expertwire::test {
namespace {

const Deadline soon() { return Deadline::after(std::chrono::seconds(10)); }

/// What every kind of bootstrap must do.
void use_bootstrap(Bootstrap& bootstrap) {
  const int rank = bootstrap.rank(), size = bootstrap.size();
  for (int round = 0; round < 20; ++round) {
    std::vector<int> values(static_cast<std::size_t>(size) * 3, -1);
    for (int i = 0; i < 3; ++i)
      values[static_cast<std::size_t>(rank * 3 + i)] = 1000 * round + 10 * rank + i;
    bootstrap.all_gather(values.data(), 3 * sizeof(int), soon());
    for (int r = 0; r < size; ++r)
      for (int i = 0; i < 3; ++i)
        if (values[static_cast<std::size_t>(r * 3 + i)] != 1000 * round + 10 * r + i)
          throw std::runtime_error("all_gather is wrong");
    int word = rank == round % size ? round : -1;
    bootstrap.broadcast(&word, sizeof(word), round % size, soon());
    if (word != round) throw std::runtime_error("broadcast is wrong");
    bootstrap.barrier(soon());
  }
}

TEST(Bootstrap, InProcess) {
  for (int size : {1, 2, 7})
    run_in_process(size, [](std::shared_ptr<Bootstrap> b) { use_bootstrap(*b); });
}

TEST(Bootstrap, OfProcesses) {
  for (int size : {1, 2, 5}) {
    const ExitCodes codes = run_processes(size, [](std::shared_ptr<Bootstrap> b) {
      use_bootstrap(*b);
      return 0;
    });
    EXPECT_EQ(codes, ExitCodes(static_cast<std::size_t>(size), 0));
  }
}

TEST(Bootstrap, OverACallback) {
  run_in_process(3, [](std::shared_ptr<Bootstrap> inner) {
    auto bootstrap = bootstrap_from_callback(
        {inner->rank(), inner->size(), [inner](void* data, std::size_t bytes, Deadline deadline) {
           inner->all_gather(data, bytes, deadline);
         }});
    EXPECT_EQ(bootstrap->kind(), "callback");
    use_bootstrap(*bootstrap);
    Communicator::create(bootstrap, small_arena())->barrier();
  });
  EXPECT_THROW(bootstrap_from_callback({0, 1, nullptr}), Error);
  EXPECT_THROW(bootstrap_from_callback({2, 2, [](void*, std::size_t, Deadline) {}}), Error);
}

TEST(Bootstrap, OverTcpOnLoopback) {
  const ExitCodes codes = run_processes(1, [](std::shared_ptr<Bootstrap>) {
    // A port that the system chose a moment ago is free for this one.
    const std::string address = "127.0.0.1:" + std::to_string(20000 + ::getpid() % 20000);
    const std::string secret(32, 's');
    std::vector<std::thread> ranks;
    std::atomic<int> good{0};
    for (int rank = 0; rank < 3; ++rank)
      ranks.emplace_back([&, rank] {
        auto b = bootstrap_from_rendezvous({rank, 3, address, secret});
        use_bootstrap(*b);
        ++good;
      });
    for (auto& thread : ranks) thread.join();
    return good == 3 ? 0 : 1;
  });
  EXPECT_EQ(codes[0], 0);
}

TEST(Bootstrap, NamesTheRankThatDoesNotCome) {
  std::atomic<int> named{0};
  EXPECT_THROW(run_in_process(3,
                              [&](std::shared_ptr<Bootstrap> b) {
                                if (b->rank() == 1) {
                                  std::this_thread::sleep_for(std::chrono::milliseconds(400));
                                  return;
                                }
                                try {
                                  b->barrier(Deadline::after(std::chrono::milliseconds(100)));
                                } catch (const Error& error) {
                                  if (error.peer() == 1 && error.code() == ErrorCode::timeout)
                                    ++named;
                                  throw;
                                }
                              }),
               Error);
  EXPECT_EQ(named, 2);
}

/// Whether the call failed as it should; `bytes` differ.
bool fails_as_different(Bootstrap& bootstrap, std::size_t bytes) {
  std::vector<std::uint64_t> words(16);
  try {
    bootstrap.all_gather(words.data(), bytes, Deadline::after(std::chrono::seconds(60)));
  } catch (const Error& error) {
    return error.code() == ErrorCode::mismatch;
  }
  return false;
}

TEST(Bootstrap, AllThreadRanksLearnThatOneCameWithAnotherSize) {
  std::atomic<int> failed{0};
  run_in_process(4, [&](std::shared_ptr<Bootstrap> b) {
    if (fails_as_different(*b, b->rank() == 2 ? 16 : 8)) ++failed;
  });
  EXPECT_EQ(failed, 4);
}

TEST(Bootstrap, AllRanksLearnThatOneCameWithAnotherSize) {
  const ExitCodes codes = run_processes(4, [](std::shared_ptr<Bootstrap> b) {
    return fails_as_different(*b, b->rank() == 2 ? 16 : 8) ? 7 : 1;
  });
  EXPECT_EQ(codes, (ExitCodes{7, 7, 7, 7}));
}

TEST(Bootstrap, OfProcessesNamesTheRankThatDied) {
  const ExitCodes codes = run_processes(4, [](std::shared_ptr<Bootstrap> b) {
    if (b->rank() == 2) ::raise(SIGKILL);
    try {
      b->barrier(soon());
    } catch (const Error& error) {
      return error.code() == ErrorCode::peer_lost && error.peer() == 2 ? 7 : 1;
    }
    return 2;
  });
  EXPECT_EQ(codes, (ExitCodes{7, 7, 128 + SIGKILL, 7}));
}

TEST(Bootstrap, SaysWhoDidNotJoin) {
  try {
    bootstrap_from_rendezvous(
        {0, 3, "@ew-test-nobody", std::string(16, 'x'), std::chrono::milliseconds(50)});
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::timeout);
    EXPECT_NE(std::string(error.what()).find("1, 2"), std::string::npos) << error.what();
  }
  EXPECT_THROW(bootstrap_from_rendezvous({0, 1, "@x", "short"}), Error);
}

void use_communicator(const std::shared_ptr<Communicator>& communicator, const char* wire) {
  const int rank = communicator->rank(), size = communicator->size();
  Arena& arena = communicator->arena();
  const auto offset = arena.carve(8192);
  std::memset(arena.local().data() + offset, 0, 8192);
  communicator->barrier();
  for (int peer = 0; peer < size; ++peer) {
    Connection& connection = communicator->connection(peer);
    const std::string expected = peer == rank ? "loopback" : wire;
    if (connection.transport() != expected || connection.peer() != peer)
      throw std::runtime_error("wrong wire");
    auto* source = reinterpret_cast<int*>(arena.local().data() + offset + 4096);
    *source = 100 + rank;
    connection.put({arena.part(peer), offset + 64 * static_cast<std::uint64_t>(rank), arena.local(),
                    offset + 4096, sizeof(int)});
    connection.flush(soon());
    connection.atomic_add({arena.part(peer), offset + 2048, 1});
  }
  communicator->barrier();
  for (int peer = 0; peer < size; ++peer) {
    int value = 0;
    std::memcpy(&value, arena.local().data() + offset + 64 * static_cast<std::size_t>(peer),
                sizeof(value));
    if (value != 100 + peer) throw std::runtime_error("wrong value");
  }
  std::uint64_t adds = 0;
  std::memcpy(&adds, arena.local().data() + offset + 2048, sizeof(adds));
  if (adds != static_cast<std::uint64_t>(size)) throw std::runtime_error("an add was lost");
  communicator->barrier();
}

TEST(Communicator, OfThreadsSharesOneMapping) {
  with_thread_ranks(5, [](const auto& communicator) {
    use_communicator(communicator, "loopback");
    EXPECT_NE(communicator->banner().find("5 ranks"), std::string::npos);
    EXPECT_NE(communicator->banner().find(kVersion), std::string::npos);
    EXPECT_EQ(communicator->topology().hosts(), 1);
    EXPECT_EQ(communicator->path(4).kind, PathKind::mapped);
    EXPECT_EQ(communicator->path(4).transport, "loopback");
    EXPECT_THROW(communicator->path(5), Error);
  });
}

TEST(Communicator, OfProcessesMapsMemfds) {
  const ExitCodes codes = run_processes(4, [](std::shared_ptr<Bootstrap> b) {
    use_communicator(Communicator::create(std::move(b), small_arena()), "shm");
    return 0;
  });
  EXPECT_EQ(codes, ExitCodes(4, 0));
}

TEST(Communicator, RanksMustAgreeOnNodes) {
  run_in_process(2, [](std::shared_ptr<Bootstrap> b) {
    CommunicatorOptions options = small_arena();
    options.ranks_per_node = b->rank() + 1;
    try {
      Communicator::create(b, options);
      ADD_FAILURE();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::mismatch);
    }
  });
}

TEST(Communicator, FindsADeadProcessWithoutADeadline) {
  const ExitCodes codes = run_processes(3, [](std::shared_ptr<Bootstrap> b) {
    auto communicator = Communicator::create(std::move(b), small_arena());
    communicator->barrier();
    if (communicator->rank() == 1) ::raise(SIGKILL);
    const Deadline deadline = soon();
    while (!deadline.expired())
      if (auto lost = communicator->find_lost_peer(-1))
        return lost->peer() == 1 && lost->code() == ErrorCode::peer_lost ? 7 : 1;
    return 2;
  });
  EXPECT_EQ(codes, (ExitCodes{7, 128 + SIGKILL, 7}));
}

TEST(Communicator, LeavingIsNoErrorUnlessAwaited) {
  const ExitCodes codes = run_processes(3, [](std::shared_ptr<Bootstrap> b) {
    auto communicator = Communicator::create(std::move(b), small_arena());
    communicator->barrier();
    if (communicator->rank() == 1) return 0;
    const Deadline deadline = soon();
    while (!communicator->find_lost_peer(1))
      if (deadline.expired()) return 1;
    return communicator->find_lost_peer(-1) ? 2 : 0;
  });
  EXPECT_EQ(codes, ExitCodes(3, 0));
}

TEST(MemoryChannel, SignalsCoverThePutsBeforeThem) {
  with_thread_ranks(3, [](const std::shared_ptr<Communicator>& communicator) {
    auto channels = MemoryChannel::open_all(communicator, 256);
    const int rank = communicator->rank(), size = communicator->size();
    const int next = (rank + 1) % size, last = (rank + size - 1) % size;
    for (std::uint64_t round = 1; round <= 500; ++round) {
      std::vector<std::uint64_t> values(32, round * 100 + static_cast<std::uint64_t>(rank));
      channels[static_cast<std::size_t>(next)].put(0, values.data(), 256);
      channels[static_cast<std::size_t>(next)].signal();
      channels[static_cast<std::size_t>(last)].wait(std::chrono::seconds(10));
      const auto* got =
          reinterpret_cast<std::uint64_t*>(channels[static_cast<std::size_t>(last)].inbox());
      for (int i = 0; i < 32; ++i)
        ASSERT_EQ(got[i], round * 100 + static_cast<std::uint64_t>(last));
      // The inbox may be written again once its reader says so.
      channels[static_cast<std::size_t>(last)].signal();
      channels[static_cast<std::size_t>(next)].wait(std::chrono::seconds(10));
    }
    EXPECT_THROW(channels[0].put(250, nullptr, 7), Error);
  });
}

TEST(MemoryChannel, ASilentPeerIsNamedAtTheDeadline) {
  with_thread_ranks(2, [](const std::shared_ptr<Communicator>& communicator) {
    auto channels = MemoryChannel::open_all(communicator, 64);
    if (communicator->rank() == 0) {
      try {
        channels[1].wait(std::chrono::milliseconds(60));
        ADD_FAILURE();
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::timeout);
        EXPECT_EQ(error.peer(), 1);
        EXPECT_EQ(error.phase(), Phase::channel);
      }
    }
    communicator->barrier();
  });
}

TEST(Communicator, LeavesNoDescriptorsBehind) {
  with_thread_ranks(2, [](const auto& c) { c->barrier(); });
  const auto before = entries_of("fd");
  for (int i = 0; i < 50; ++i) with_thread_ranks(3, [](const auto& c) { c->barrier(); });
  EXPECT_EQ(entries_of("fd"), before);
}

}  // namespace
}  // namespace expertwire::test
