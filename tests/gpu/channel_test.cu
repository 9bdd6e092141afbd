// Memory channels in kernels, and the host's connections to device memory.

#include <gtest/gtest.h>

#include <atomic>

#include "expertwire/memory_channel_device.cuh"
#include "gpu/buffers.hpp"
#include "ranks/thread_ranks.hpp"

namespace expertwire::test {
namespace {

constexpr int kWords = 1024, kRounds = 200;
constexpr std::uint64_t kDeadlineNs = 5'000'000'000;

__device__ std::uint32_t word(int from, int to, int round, int i) {
  return static_cast<std::uint32_t>(((from * 7 + to) * 1009 + round) * 4099 + i);
}

/// One block: puts into the peer's inbox, signals, waits, and checks what came; then waits for the
/// peer to have read it.
__global__ void ping_pong(MemoryChannelDevice channel, int rank, int peer, std::uint32_t* source,
                          unsigned long long* wrong) {
  __shared__ bool good;
  for (int round = 0; round < kRounds; ++round) {
    for (int i = threadIdx.x; i < kWords; i += blockDim.x) source[i] = word(rank, peer, round, i);
    __syncthreads();
    channel.put(0, source, kWords * sizeof(std::uint32_t), threadIdx.x, blockDim.x);
    __syncthreads();
    if (threadIdx.x == 0) {
      channel.signal();
      good = channel.wait(2 * round + 1, kDeadlineNs);
    }
    __syncthreads();
    if (!good) {
      if (threadIdx.x == 0) atomicAdd(wrong, 1000000ULL);
      return;
    }
    const auto* inbox = reinterpret_cast<const volatile std::uint32_t*>(channel.inbox);
    for (int i = threadIdx.x; i < kWords; i += blockDim.x)
      if (inbox[i] != word(peer, rank, round, i)) atomicAdd(wrong, 1ULL);
    __syncthreads();
    if (threadIdx.x == 0) {
      channel.signal();
      good = channel.wait(2 * round + 2, kDeadlineNs);
    }
    __syncthreads();
    if (!good) return;
  }
}

/// Every thread of every block adds to one word of the peer, up and down.
__global__ void add_much(MemoryChannelDevice channel) {
  for (int i = 0; i < 100; ++i) channel.atomic_add(8, i % 4 == 3 ? -2 : 1);
}

/// A deadline that passes.
__global__ void wait_in_vain(MemoryChannelDevice channel, int* result) {
  *result = channel.wait(1'000'000, 20'000'000) ? 1 : 2;
}

TEST(ChannelOnDevice, PutSignalWait) {
  std::atomic<unsigned long long> total{0};
  with_thread_ranks(3, [&](const std::shared_ptr<Communicator>& communicator) {
    const int rank = communicator->rank();
    Buffers buffers(communicator->cuda_device());
    auto channels = MemoryChannel::open_all(communicator, kWords * sizeof(std::uint32_t));
    const TensorView wrong = buffers.make(DType::int64, {1});
    check_cuda(cudaMemsetAsync(wrong.data(), 0, 8, buffers.stream()), "cudaMemsetAsync");
    std::vector<std::unique_ptr<Buffers>> others;
    for (int peer = 0; peer < 3; ++peer) {  // all pairs at once, a block and a stream each
      others.push_back(std::make_unique<Buffers>(communicator->cuda_device()));
      const TensorView source = others.back()->make(DType::int32, {kWords});
      buffers.synchronize();
      ping_pong<<<1, 256, 0, others.back()->stream()>>>(
          channels[static_cast<std::size_t>(peer)].device(), rank, peer, source.as<std::uint32_t>(),
          wrong.as<unsigned long long>());
      check_cuda(cudaGetLastError(), "launch");
    }
    for (const auto& other : others) other->synchronize();
    total += *reinterpret_cast<unsigned long long*>(buffers.download(wrong).data());
    communicator->barrier();
  });
  EXPECT_EQ(total, 0U);
}

TEST(ChannelOnDevice, AtomicAddsOfManyBlocksAndTheHost) {
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    const int rank = communicator->rank(), peer = 1 - rank;
    Buffers buffers(communicator->cuda_device());
    auto channels = MemoryChannel::open_all(communicator, 64);
    MemoryChannel& channel = channels[static_cast<std::size_t>(peer)];
    check_cuda(cudaMemset(channel.inbox(), 0, 64), "cudaMemset");
    communicator->barrier();
    const MemoryChannelDevice device = channel.device();
    add_much<<<20, 128, 0, buffers.stream()>>>(device);
    check_cuda(cudaGetLastError(), "launch");
    // The host adds to the same word, through the connection.
    Connection& connection = communicator->connection(peer);
    const Memory& theirs = communicator->arena().part(peer);
    const auto offset = static_cast<std::uint64_t>(device.peer_inbox + 8 - theirs.data());
    for (int i = 0; i < 50; ++i) connection.atomic_add({theirs, offset, i % 2 == 0 ? 1000 : -3});
    connection.flush(Deadline::after(std::chrono::seconds(5)));
    buffers.synchronize();
    communicator->barrier();
    std::int64_t sum = 0;
    buffers.copy(&sum, channel.inbox() + 8, sizeof(sum));
    buffers.synchronize();
    EXPECT_EQ(sum, 20LL * 128 * (75 - 50) + 25 * 1000 - 25 * 3);
    communicator->barrier();
  });
}

TEST(ChannelOnDevice, ConnectionPutsBeforeItsSignal) {
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    const int rank = communicator->rank(), peer = 1 - rank;
    constexpr std::size_t kBytes = 1 << 20;
    Buffers buffers(communicator->cuda_device());
    Arena& arena = communicator->arena();
    const std::uint64_t mine = arena.carve(2 * kBytes + 4096);
    std::vector<std::uint64_t> offsets(2);
    offsets[static_cast<std::size_t>(rank)] = mine;
    communicator->all_gather(offsets.data(), sizeof(std::uint64_t));
    const std::uint64_t theirs = offsets[static_cast<std::size_t>(peer)];
    std::vector<std::uint32_t> data(kBytes / 4);
    for (std::size_t i = 0; i < data.size(); ++i)
      data[i] = static_cast<std::uint32_t>(i * 31 + static_cast<std::size_t>(rank));
    buffers.copy(arena.local().data() + mine + kBytes, data.data(), kBytes);
    check_cuda(cudaMemsetAsync(arena.local().data() + mine + 2 * kBytes, 0, 8, buffers.stream()),
               "cudaMemsetAsync");
    buffers.synchronize();
    communicator->barrier();
    Connection& connection = communicator->connection(peer);
    EXPECT_EQ(connection.transport(), "cuda_ipc");
    connection.put_with_signal({arena.part(peer), theirs, arena.local(), mine + kBytes, kBytes},
                               {arena.part(peer), theirs + 2 * kBytes, 42});
    std::uint64_t signal = 0;
    while (signal != 42) {
      buffers.copy(&signal, arena.local().data() + mine + 2 * kBytes, sizeof(signal));
      buffers.synchronize();
    }
    std::vector<std::uint32_t> came(data.size());
    buffers.copy(came.data(), arena.local().data() + mine, kBytes);
    buffers.synchronize();
    for (std::size_t i = 0; i < came.size(); ++i)
      ASSERT_EQ(came[i], static_cast<std::uint32_t>(i * 31 + static_cast<std::size_t>(peer)));
    EXPECT_THROW(connection.atomic_add({arena.part(peer), theirs + 4, 1}), Error);
    connection.flush(Deadline::after(std::chrono::seconds(5)));
    communicator->barrier();
    arena.give_back(mine);
  });
}

TEST(ChannelOnDevice, WaitHasADeadline) {
  with_thread_ranks(1, [&](const std::shared_ptr<Communicator>& communicator) {
    Buffers buffers(communicator->cuda_device());
    auto channels = MemoryChannel::open_all(communicator, 64);
    const TensorView result = buffers.make(DType::int32, {1});
    wait_in_vain<<<1, 1, 0, buffers.stream()>>>(channels[0].device(), result.as<int>());
    EXPECT_EQ(*reinterpret_cast<int*>(buffers.download(result).data()), 2);
  });
}

}  // namespace
}  // namespace expertwire::test
