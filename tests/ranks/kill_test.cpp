// A rank dies of kill -9 in the middle of either mode: the others end, name it, and nothing of the
// job stays behind.

#include <dirent.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <chrono>
#include <set>
#include <string>
#include <thread>

#include "ranks/processes.hpp"
#include "ranks/thread_ranks.hpp"

namespace expertwire::test {
namespace {

using reference::RoutingPattern;
using reference::Workload;

std::set<std::string> files_in(const char* folder) {
  std::set<std::string> names;
  if (DIR* handle = ::opendir(folder)) {
    while (const dirent* entry = ::readdir(handle)) {
      const std::string name = entry->d_name;
      if (name.find("expertwire") != std::string::npos || name.rfind("ew-", 0) == 0)
        names.insert(name);
    }
    ::closedir(handle);
  }
  return names;
}

/// On a GPU a rank has one to itself.
int ranks_here() {
  int ranks = 0;
  while (ranks < 3 && cuda_device_of(ranks) == ranks) ++ranks;
  return kOnCuda ? ranks : 3;
}

class KilledRank : public testing::TestWithParam<std::tuple<bool, int>> {};

TEST_P(KilledRank, IsNamedByTheOthers) {
  const auto [high_throughput, delay_us] = GetParam();
  const MoeShape shape{512, 24, 4, 64, DType::bf16};
  const auto shm = files_in("/dev/shm"), tmp = files_in("/tmp");
  const int ranks = ranks_here();
  if (ranks < 2) GTEST_SKIP() << "two GPUs are needed; tools/gpu_check.sh runs this where they are";
  const ExitCodes codes = run_processes(ranks, [&](std::shared_ptr<Bootstrap> b) {
    CommunicatorOptions options = small_arena();
    if (kOnCuda) options.cuda_device = b->rank();
    auto communicator = Communicator::create(std::move(b), options);
    const Workload workload({shape, ranks, 8, RoutingPattern::parse("uniform")});
    std::unique_ptr<LowLatency> ll;
    std::unique_ptr<HighThroughput> ht;
    if (high_throughput)
      ht = HighThroughput::create(communicator, {shape});
    else
      ll = LowLatency::create(communicator, {shape});
    std::thread killer;
    try {
      communicator->barrier();
      if (communicator->rank() == 1)
        killer = std::thread([delay = delay_us] {
          std::this_thread::sleep_for(std::chrono::microseconds(delay));
          ::kill(::getpid(), SIGKILL);
        });
      for (;;) {
        if (high_throughput)
          round_trip(*ht, *communicator, workload, 0, {});
        else
          round_trip(*ll, *communicator, workload, 0, {});
      }
    } catch (const Error& error) {
      if (error.code() == ErrorCode::peer_lost && error.peer() == 1) return 7;
      fmt::print(stderr, "rank {}: {}\n", communicator->rank(), error.what());
    }
    return 1;
  });
  ExitCodes want(static_cast<std::size_t>(ranks), 7);
  want[1] = 128 + SIGKILL;
  EXPECT_EQ(codes, want);
  EXPECT_EQ(files_in("/dev/shm"), shm);
  EXPECT_EQ(files_in("/tmp"), tmp);
}

INSTANTIATE_TEST_SUITE_P(Moments, KilledRank,
                         testing::Combine(testing::Bool(),
                                          testing::Values(1000, 3000, 20000, 50001)),
                         [](const auto& test) {
                           return std::string(std::get<0>(test.param) ? "ht" : "ll") + "_after_" +
                                  std::to_string(std::get<1>(test.param)) + "us";
                         });

}  // namespace
}  // namespace expertwire::test
