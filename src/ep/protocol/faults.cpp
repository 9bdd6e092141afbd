// Part of test builds only.
#include "ep/protocol/faults.hpp"

#include <atomic>
#include <chrono>
#include <thread>

namespace expertwire::inline v0::ep {

namespace {

std::atomic<Fault> removed_part{Fault::none};
std::atomic<std::uint32_t> longest{0};
std::atomic<std::uint64_t> delay_seed{1};
std::atomic<std::uint64_t> threads_seen{0};

std::atomic<int> stopped_rank{-1};
std::atomic<std::int32_t> stopped_at{-1};

std::uint64_t next_random() {
  thread_local std::uint64_t state = delay_seed.load() * 0x9E3779B97F4A7C15ULL +
                                     (threads_seen.fetch_add(1) + 1) * 0xD1B54A32D192ED03ULL;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

}  // namespace

void remove_part(Fault fault) noexcept { removed_part = fault; }
bool removed(Fault fault) noexcept { return removed_part.load(std::memory_order_relaxed) == fault; }

void stop_rank(int rank, std::int32_t phase) noexcept {
  stopped_at = phase;
  stopped_rank = rank;
}

KernelFaults kernel_faults(int rank) noexcept {
  return {removed_part, longest * 1000, stopped_rank == rank ? stopped_at.load() : -1};
}

void set_delays(std::uint32_t microseconds, std::uint64_t seed) noexcept {
  longest = microseconds;
  delay_seed = seed;
}

void delay() noexcept {
  const std::uint32_t most = longest.load(std::memory_order_relaxed);
  if (most == 0) return;
  const std::uint64_t draw = next_random();
  if (draw % 4 != 0) return;
  std::this_thread::sleep_for(std::chrono::microseconds((draw >> 8) % (most + 1)));
}

}  // namespace expertwire::ep
