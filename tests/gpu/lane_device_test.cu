// The lane protocol between blocks of one GPU: every block is a rank, and runs the functions of
// ep/protocol/lane.hpp as kernels will. Ranks are slowed down at random; what they read is checked
// word by word. The same without credit, or without flags, must be found wrong.

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "ep/cuda/kernel/access.cuh"
#include "ep/protocol/slots.hpp"

namespace expertwire::ep {
namespace {

// Config -----------------------------------------------------------------------------------------

constexpr int kRanks = 6;
constexpr int kThreads = 256;
constexpr int kWords = 2048;  // of a row
constexpr std::uint64_t kDeadlineNs = 2'000'000'000;

// Params -----------------------------------------------------------------------------------------

struct RankMemory {
  DirectionWords words;
  Epoch consumed[kRanks];
  Epoch flags[kSlots][kRanks];
  std::uint32_t rows[kSlots][kRanks][kWords];
};

struct Params {
  RankMemory* ranks;
  int epochs;
  bool one_way;  ///< rank 0 alone sends
  std::uint32_t seed;
  unsigned long long* wrong;  ///< words that were not what they must be
  unsigned* late;             ///< waits that reached their deadline
};

// Faults -----------------------------------------------------------------------------------------

template <Fault kRemoved>
struct Removed {
  __device__ static constexpr bool removed(Fault fault) { return fault == kRemoved; }
  __device__ static void delay() {}
};

// Device -----------------------------------------------------------------------------------------

__device__ std::uint32_t mix(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t z = a * 0x9E3779B9U ^ b * 0x85EBCA6BU ^ c * 0xC2B2AE35U;
  z ^= z >> 15;
  z *= 0x2C1B3C6DU;
  return z ^ (z >> 12);
}

/// Polls until ready; false at the deadline. Called by one thread.
template <class Ready>
__device__ bool wait_for(const Params& p, Ready ready) {
  const std::uint64_t start = device::now_ns();
  while (!ready())
    if (device::now_ns() - start > kDeadlineNs) {
      atomicAdd(p.late, 1U);
      return false;
    }
  return true;
}

__device__ void dawdle(const Params& p, std::uint32_t rank, Epoch n, std::uint32_t where) {
  const std::uint32_t draw = mix(p.seed + rank, n, where);
  if (draw % 4 == 0) __nanosleep((draw >> 8) % 20000);
}

template <class Access>
__global__ void run_ranks(const __grid_constant__ Params p) {
  const auto rank = static_cast<int>(blockIdx.x);
  RankMemory& mine = p.ranks[rank];
  const Direction<Access> lane{&mine.words, mine.consumed};
  __shared__ bool go;
  __shared__ Epoch epoch;
  auto sends = [&](int from) { return !p.one_way || from == 0; };

  for (int i = 0; i < p.epochs; ++i) {
    // Read once, before anybody can advance it: a late thread would take the next epoch.
    if (threadIdx.x == 0) epoch = lane.sending();
    __syncthreads();
    const Epoch n = epoch;
    for (int k = 1; k <= kRanks && sends(rank); ++k) {
      const int peer = (rank + k) % kRanks;
      if (threadIdx.x == 0) {
        dawdle(p, rank, n, 2 * peer);
        go = wait_for(p, [&] { return lane.may_write(peer, n); });
      }
      __syncthreads();
      if (!go) return;
      for (int w = threadIdx.x; w < kWords; w += kThreads)
        p.ranks[peer].rows[slot_of(n)][rank][w] = mix(n, rank * kRanks + peer, w);
      __syncthreads();
      if (threadIdx.x == 0) publish<Access>(&p.ranks[peer].flags[slot_of(n)][rank], n);
    }
    if (threadIdx.x == 0) lane.finish_send(n, 1);

    unsigned long long wrong = 0;
    for (int k = 1; k <= kRanks; ++k) {
      const int source = (rank + k) % kRanks;
      if (!sends(source)) continue;
      if (threadIdx.x == 0) {
        go = wait_for(p, [&] { return arrived<Access>(&mine.flags[slot_of(n)][source], n); });
        dawdle(p, rank, n, 2 * source + 1);
      }
      __syncthreads();
      if (!go) return;
      for (int w = threadIdx.x; w < kWords; w += kThreads)
        wrong += mine.rows[slot_of(n)][source][w] != mix(n, source * kRanks + rank, w);
      __syncthreads();
    }
    if (wrong != 0) atomicAdd(p.wrong, wrong);
    if (threadIdx.x == 0) {
      for (int peer = 0; peer < kRanks; ++peer) grant<Access>(&p.ranks[peer].consumed[rank], n);
      lane.finish_receive(n, 1);
    }
    __syncthreads();
  }
}

// Launch -----------------------------------------------------------------------------------------

struct Outcome {
  unsigned long long wrong = 0;
  unsigned late = 0;
  Epoch last_sent = 0;
};

#define ASSERT_CUDA(call) ASSERT_EQ(call, cudaSuccess) << #call

template <class Access>
void run(bool one_way, int epochs, Epoch first, std::uint32_t seed, Outcome* outcome) {
  RankMemory* memory = nullptr;
  unsigned long long* wrong = nullptr;
  unsigned* late = nullptr;
  std::vector<RankMemory> start(kRanks);
  for (RankMemory& rank : start) {
    auto* words = reinterpret_cast<Epoch*>(&rank);
    std::fill(words, words + sizeof(RankMemory) / sizeof(Epoch), first);
    rank.words = {first, first, 0, 0};
  }
  ASSERT_CUDA(cudaMalloc(&memory, kRanks * sizeof(RankMemory)));
  ASSERT_CUDA(cudaMalloc(&wrong, sizeof(*wrong)));
  ASSERT_CUDA(cudaMalloc(&late, sizeof(*late)));
  ASSERT_CUDA(
      cudaMemcpy(memory, start.data(), kRanks * sizeof(RankMemory), cudaMemcpyHostToDevice));
  ASSERT_CUDA(cudaMemset(wrong, 0, sizeof(*wrong)));
  ASSERT_CUDA(cudaMemset(late, 0, sizeof(*late)));
  run_ranks<Access><<<kRanks, kThreads>>>({memory, epochs, one_way, seed, wrong, late});
  ASSERT_CUDA(cudaGetLastError());
  ASSERT_CUDA(cudaDeviceSynchronize());
  ASSERT_CUDA(cudaMemcpy(&outcome->wrong, wrong, sizeof(*wrong), cudaMemcpyDeviceToHost));
  ASSERT_CUDA(cudaMemcpy(&outcome->late, late, sizeof(*late), cudaMemcpyDeviceToHost));
  ASSERT_CUDA(cudaMemcpy(&outcome->last_sent, &memory[0].words.sent, sizeof(Epoch),
                         cudaMemcpyDeviceToHost));
  cudaFree(memory);
  cudaFree(wrong);
  cudaFree(late);
}

constexpr Epoch kAlmostWrapped = 0xFFFFFFF0;

TEST(LaneOnDevice, EveryWordIsRightAndEpochsWrap) {
  for (bool one_way : {false, true})
    for (std::uint32_t seed = 1; seed <= 5; ++seed) {
      Outcome outcome;
      run<cuda::DeviceAccess<>>(one_way, 301, kAlmostWrapped, seed, &outcome);
      EXPECT_EQ(outcome.wrong, 0U);
      EXPECT_EQ(outcome.late, 0U);
      EXPECT_EQ(outcome.last_sent, kAlmostWrapped + 301);
    }
}

TEST(LaneOnDevice, WithoutCreditUnreadRowsAreLost) {
  unsigned long long found = 0;
  for (std::uint32_t seed = 1; seed <= 50 && found == 0; ++seed) {  // it takes a slow receiver
    Outcome outcome;
    run<cuda::DeviceAccess<Removed<Fault::credit>>>(true, 301, kAlmostWrapped, seed, &outcome);
    found += outcome.wrong + outcome.late;
  }
  EXPECT_GT(found, 0U);
}

TEST(LaneOnDevice, WithoutFlagsRowsAreReadTooEarly) {
  unsigned long long found = 0;
  for (std::uint32_t seed = 1; seed <= 50 && found == 0; ++seed) {
    Outcome outcome;
    run<cuda::DeviceAccess<Removed<Fault::flag>>>(false, 301, kAlmostWrapped, seed, &outcome);
    found += outcome.wrong;
  }
  EXPECT_GT(found, 0U);
}

}  // namespace
}  // namespace expertwire::ep
