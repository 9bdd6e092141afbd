#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <mutex>

#include "expertwire/communicator.hpp"
#include "reference/round_trip.hpp"

namespace expertwire::test {

/// Tests that include this run on the backend that their program was built for: gpu_tests has the
/// same sources as rank_tests, on CUDA. There, ranks share the GPUs in turn.
#if defined(EXPERTWIRE_TEST_ON_CUDA)
int cuda_device_of(int rank);  ///< tests/gpu/devices.cpp
inline constexpr bool kOnCuda = true;
#else
inline int cuda_device_of(int) { return -1; }
inline constexpr bool kOnCuda = false;
#endif

/// Small enough for many ranks in one process, large enough for what tests need.
inline CommunicatorOptions small_arena() {
  CommunicatorOptions options;
  options.arena_bytes = std::size_t{1} << (kOnCuda ? 29 : 32);
  options.timeout = std::chrono::milliseconds(20000);
  return options;
}

/// Runs `body(communicator)` on `ranks` threads of this process.
inline void with_thread_ranks(int ranks,
                              const std::function<void(const std::shared_ptr<Communicator>&)>& body,
                              const CommunicatorOptions& options = small_arena()) {
  run_in_process(ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    CommunicatorOptions mine = options;
    if (kOnCuda) mine.cuda_device = cuda_device_of(bootstrap->rank());
    body(Communicator::create(std::move(bootstrap), mine));
  });
}

/// What went wrong with an object; empty while nothing has.
inline std::string said(const Status& status) { return status.error ? status.error->what() : ""; }

/// Collects the reports of thread ranks and expects all values to be right.
class Reports {
 public:
  void add(const reference::Report& report) {
    std::lock_guard lock(mutex_);
    total_ += report;
  }
  ~Reports() {
    EXPECT_EQ(total_.wrong, 0) << total_.first_wrong;
    EXPECT_GT(total_.checked, 0);
  }

 private:
  std::mutex mutex_;
  reference::Report total_;
};

}  // namespace expertwire::test
