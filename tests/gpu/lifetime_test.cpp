// A thousand objects made, used and destroyed leave nothing behind.

#include <cuda_runtime_api.h>

#include <filesystem>

#include "ranks/thread_ranks.hpp"

namespace expertwire::test {
namespace {

struct Footprint {
  std::size_t device_bytes = 0, descriptors = 0, threads = 0;
};

std::size_t entries(const char* folder) {
  std::size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder)) ++count;
  return count;
}

Footprint footprint() {
  std::size_t free = 0, total = 0;
  cudaDeviceSynchronize();
  cudaMemPool_t pool = nullptr;
  int device = 0;
  cudaGetDevice(&device);
  cudaDeviceGetDefaultMemPool(&pool, device);
  cudaMemPoolTrimTo(pool, 0);
  cudaMemGetInfo(&free, &total);
  return {total - free, entries("/proc/self/fd"), entries("/proc/self/task")};
}

TEST(Lifetime, AThousandObjectsLeaveNothing) {
  const MoeShape shape{64, 8, 2, 16, DType::bf16};
  const reference::Workload workload(
      {shape, 2, 3, reference::RoutingPattern::parse("uniform"), true});
  Reports reports;
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    Footprint before;
    for (int i = 0; i < 500; ++i) {
      if (i == 20) {
        communicator->barrier();
        if (communicator->rank() == 0) before = footprint();
        communicator->barrier();
      }
      auto ll = LowLatency::create(communicator, {shape});
      auto ht = HighThroughput::create(communicator, {shape});
      if (i % 10 != 0) continue;
      reports.add(round_trip(*ll, *communicator, workload, i, {}));
      reports.add(round_trip(*ht, *communicator, workload, i, {}));
    }
    communicator->barrier();
    EXPECT_EQ(communicator->arena().carved(), 0U);
    if (communicator->rank() == 0) {
      const Footprint after = footprint();
      EXPECT_LE(after.device_bytes, before.device_bytes + (std::size_t{4} << 20));
      EXPECT_LE(after.descriptors, before.descriptors + 2);
      EXPECT_LE(after.threads, before.threads);
    }
    communicator->barrier();
  });
}

}  // namespace
}  // namespace expertwire::test
