// Port channels in kernels, and device memory behind ports.

#include <gtest/gtest.h>

#include "expertwire/port_channel_device.cuh"
#include "gpu/buffers.hpp"
#include "ranks/shared_memory.hpp"
#include "ranks/thread_ranks.hpp"

namespace expertwire::test {
namespace {

constexpr std::uint64_t kDeadlineNs = 10'000'000'000;
constexpr std::chrono::milliseconds kLong{20000};

/// One thread a block pushes: adds, a negative one among them, and small puts between.
__global__ void add_and_put(PortChannelDevice channel, PortChannelDevice::Place word,
                            PortChannelDevice::Place to, PortChannelDevice::Place from,
                            int* failed) {
  if (threadIdx.x != 0) return;
  for (int i = 0; i < 50; ++i) {
    bool good = channel.atomic_add(word, i % 5 == 0 ? -7 : 3, kDeadlineNs);
    if (i % 10 == 3)
      good = good && channel.put({to.memory, to.offset + 64 * blockIdx.x},
                                 {from.memory, from.offset + 64 * blockIdx.x}, 64, kDeadlineNs);
    if (!good) atomicAdd(failed, 1);
  }
  if (!channel.flush(kDeadlineNs)) atomicAdd(failed, 1000);
}

/// A block sends rows whose bytes it has written, and checks those that come.
__global__ void ping_pong(PortChannelDevice channel, PortChannelDevice::Place to,
                          PortChannelDevice::Place from, std::uint32_t* in, std::uint32_t* out,
                          int rank, int words, int rounds, int* wrong) {
  __shared__ bool good;
  for (int n = 1; n <= rounds; ++n) {
    for (int i = threadIdx.x; i < words; i += blockDim.x) out[i] = rank * 1000003 + n * 4099 + i;
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0) {
      good = channel.put_with_signal(to, from, words * sizeof(std::uint32_t), kDeadlineNs) &&
             channel.wait(2 * n - 1, kDeadlineNs);
    }
    __syncthreads();
    if (!good) {
      if (threadIdx.x == 0) atomicAdd(wrong, 1000000);
      return;
    }
    const volatile std::uint32_t* came = in;
    for (int i = threadIdx.x; i < words; i += blockDim.x)
      if (came[i] != static_cast<std::uint32_t>((1 - rank) * 1000003 + n * 4099 + i))
        atomicAdd(wrong, 1);
    __syncthreads();
    // Read; and the source may be written again once its put has been flushed.
    if (threadIdx.x == 0)
      good = channel.signal(kDeadlineNs) && channel.flush(kDeadlineNs) &&
             channel.wait(2 * n, kDeadlineNs);
    __syncthreads();
    if (!good) return;
  }
}

__global__ void push_nonsense(PortChannelDevice channel, PortChannelDevice::Place word) {
  channel.atomic_add({word.memory, 4}, 1, kDeadlineNs);
}

__global__ void wait_in_vain(PortChannelDevice channel, int* result) {
  *result = channel.wait(1'000'000, 20'000'000) ? 1 : 2;
}

int value_of(Buffers& buffers, const TensorView& word) {
  return *reinterpret_cast<int*>(buffers.download(word).data());
}

TEST(PortOnDevice, AddsAndPutsOfManyBlocks) {
  with_thread_ranks(2, [](const std::shared_ptr<Communicator>& c) {
    constexpr int kBlocks = 64;
    Buffers buffers(c->cuda_device());
    const TensorView failed = buffers.make(DType::int32, {1});
    check_cuda(cudaMemsetAsync(failed.data(), 0, 4, buffers.stream()), "cudaMemsetAsync");
    const SharedMemory memory(*c, Wire::shm, 1 << 16);
    for (std::size_t i = 0; i < kBlocks * 8; ++i) *memory.words(32768 + i * 8) = pattern(3, i);
    auto channels = PortChannel::open_all(c);
    const int peer = 1 - c->rank();
    c->barrier();
    const std::uint32_t theirs = memory.of(peer).id(), mine = memory.mine().id();
    add_and_put<<<kBlocks, 32, 0, buffers.stream()>>>(
        channels[static_cast<std::size_t>(peer)].device(), {theirs, 0}, {theirs, 4096},
        {mine, 32768}, failed.as<int>());
    check_cuda(cudaGetLastError(), "launch");
    EXPECT_EQ(value_of(buffers, failed), 0);
    c->barrier();
    EXPECT_EQ(static_cast<std::int64_t>(memory.acquire(0)), kBlocks * (40 * 3 - 10 * 7));
    for (std::size_t i = 0; i < kBlocks * 8; ++i)
      ASSERT_EQ(*memory.words(4096 + i * 8), pattern(3, i)) << i;
    c->barrier();
  });
}

/// Of host memory that kernels use, or of device memory.
void run_ping_pong(bool device) {
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& c) {
    constexpr int kWords = 5000;
    constexpr std::size_t kBytes = 1 << 16;
    Buffers buffers(c->cuda_device());
    const TensorView wrong = buffers.make(DType::int32, {1});
    const TensorView own = buffers.make(DType::int32, {kBytes / 4});
    check_cuda(cudaMemsetAsync(wrong.data(), 0, 4, buffers.stream()), "cudaMemsetAsync");
    const Memory mine = device ? c->register_memory(own.data(), kBytes, MemoryKind::cuda)
                               : c->allocate_memory(kBytes);
    std::vector<std::array<char, 512>> texts(2);
    const auto rank = static_cast<std::size_t>(c->rank());
    const std::string text = mine.serialize();
    text.copy(texts[rank].data(), text.size());
    c->all_gather(texts.data(), 512);
    const Memory theirs = c->open_memory({texts[1 - rank].data(), text.size()});
    auto channels = PortChannel::open_all(c);
    buffers.synchronize();
    c->barrier();
    auto* words = reinterpret_cast<std::uint32_t*>(mine.data());
    ping_pong<<<1, 256, 0, buffers.stream()>>>(channels[1 - rank].device(), {theirs.id(), 0},
                                               {mine.id(), kBytes / 2}, words, words + kBytes / 8,
                                               c->rank(), kWords, 100, wrong.as<int>());
    check_cuda(cudaGetLastError(), "launch");
    EXPECT_EQ(value_of(buffers, wrong), 0);
    channels[1 - rank].flush(kLong);
    c->barrier();
    c->deregister_memory(mine);
  });
}

TEST(PortOnDevice, PingPongThroughHostMemory) { run_ping_pong(false); }
TEST(PortOnDevice, PingPongThroughDeviceMemory) { run_ping_pong(true); }

TEST(PortOnDevice, NonsenseIsRefusedAndSaidToTheHost) {
  with_thread_ranks(1, [](const std::shared_ptr<Communicator>& c) {
    Buffers buffers(c->cuda_device());
    const SharedMemory memory(*c, Wire::shm, 4096);
    auto channels = PortChannel::open_all(c);
    push_nonsense<<<1, 1, 0, buffers.stream()>>>(channels[0].device(), {memory.mine().id(), 0});
    check_cuda(cudaGetLastError(), "launch");
    buffers.synchronize();
    std::string said;
    const Deadline deadline = Deadline::after(kLong);
    while (said.empty() && !deadline.expired()) try {
        channels[0].flush(kLong);
      } catch (const Error& error) {
        said = error.what();
      }
    EXPECT_NE(said.find("no multiple of 8"), std::string::npos) << said;
  });
}

TEST(PortOnDevice, WaitHasADeadline) {
  with_thread_ranks(1, [](const std::shared_ptr<Communicator>& c) {
    Buffers buffers(c->cuda_device());
    auto channels = PortChannel::open_all(c);
    const TensorView result = buffers.make(DType::int32, {1});
    wait_in_vain<<<1, 1, 0, buffers.stream()>>>(channels[0].device(), result.as<int>());
    EXPECT_EQ(value_of(buffers, result), 2);
  });
}

}  // namespace
}  // namespace expertwire::test
