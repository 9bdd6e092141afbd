#pragma once

// What the kernels of both modes have in common: how they enter and leave, wait, and address the
// memory of a lane.

#include "ep/cuda/kernel/peer.cuh"
#include "ep/protocol/routing.hpp"
#include "ep/protocol/slots.hpp"
#include "expertwire/error.hpp"

namespace expertwire::inline v0::ep::cuda {

using device::kAllLanes;

/// The sum of `value` over this lane and those before it; all lanes of a warp call.
__device__ __forceinline__ std::int32_t sum_up_to(std::int32_t value, int lane) {
  for (int step = 1; step < 32; step *= 2) {
    const std::int32_t lower = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += lower;
  }
  return value;
}

/// The `i`-th rank from this one on: ranks do not all begin with the same peer.
__device__ __forceinline__ int source_at(const Context& context, int i) {
  const int source = context.rank + i;
  return source < context.size ? source : source - context.size;
}

/// Leaves a report for the host, if nobody has before, and makes all kernels of the object leave.
/// On return the report is there.
__device__ __noinline__ inline void report_failure(const Context& context, const Failure& failure) {
  constexpr std::uint64_t kLongestReportNs = 1'000'000'000;
  KernelWords& words = *context.words;
  if (atomicCAS(&words.claimed, 0U, 1U) != 0U) {
    const std::uint64_t begin = device::now_ns();
    while (device::load_acquire_system(&words.failed) == 0 &&
           device::now_ns() - begin < kLongestReportNs) {
    }
    return;
  }
  context.host->failure = failure;
  device::store_release_system(&context.host->failed, 1);
  device::store_release_system(&words.failed, 1);
}

/// How long a thread has waited, and what it does about it. Not inlined: short kernels wait for
/// every line of their code.
///
/// Thousands of threads wait, so all of them ask device memory alone. One a peer, elected by the
/// time of the last look, looks at the host; if it finds that a peer is lost it reports, and the
/// others learn of that as of every other failure.
struct Patience {
  static constexpr std::uint64_t kTurnNs = 100'000;
  std::uint64_t start = 0, next_turn = 0;  // 0: has not begun
  std::uint32_t abort = HostWords::kGoOn;  // what the host said

  enum Verdict { kGoOn, kLastLook, kGiveUp };
  /// After polls in vain.
  __device__ __noinline__ Verdict judge(const Context& context, int peer) {
    const std::uint64_t now = device::now_ns();
    if (start == 0) {
      start = now;
      next_turn = now + kTurnNs;
    }
    if (now < next_turn) return kGoOn;
    next_turn = now + kTurnNs;
    if (device::load_relaxed_system(&context.words->failed) != 0) return kGiveUp;
    if (now - start >= context.timeout_ns) return kLastLook;
    return elected(context, peer, now) && aborts(context, peer) ? kLastLook : kGoOn;
  }
  __device__ __noinline__ void report(const Context& context, int peer, Phase phase,
                                      std::uint64_t detail) const {
    const std::uint64_t waited = device::now_ns() - start;
    if (abort == HostWords::kGoOn)
      report_failure(context, {ErrorCode::timeout, phase, peer, {}, detail, waited});
    else
      report_failure(
          context, {ErrorCode::peer_lost, phase, static_cast<int>(abort) - 1, {}, detail, waited});
  }

 private:
  __device__ static bool elected(const Context& context, int peer, std::uint64_t now) {
    unsigned long long& last = context.words->looked_at[peer];
    const std::uint64_t seen =
        device::load_relaxed_system(reinterpret_cast<const std::uint64_t*>(&last));
    return now - seen >= kTurnNs && now > seen && atomicCAS(&last, seen, now) == seen;
  }
  __device__ bool aborts(const Context& context, int peer) {
    device::store_relaxed_system(&context.host->awaited[peer], 1);
    abort = device::load_relaxed_system(&context.host->abort);
    return abort != HostWords::kGoOn;
  }
};

/// Polls `ready()` until it is true; called by one thread. False when the wait is given up: at the
/// deadline, when another thread of the object failed, or when the host says so. `ready` may say
/// that it waits for another `peer` now.
template <class Ready>
__device__ __forceinline__ bool wait_until(const Context& context, const int& peer, Phase phase,
                                           std::uint64_t detail, Ready ready) {
  constexpr int kPolls = 16;
  Patience patience;
#pragma unroll 1
  for (bool last = false;;) {
#pragma unroll 1
    for (int i = 0; i < kPolls; ++i)
      if (ready()) return true;
    if (last) {
      patience.report(context, peer, phase, detail);
      return false;
    }
    const Patience::Verdict verdict = patience.judge(context, peer);
    if (verdict == Patience::kGiveUp) return false;
    last = verdict == Patience::kLastLook;
  }
}

/// Notes a moment of this block, or of one of its threads, if the launch is traced. All threads may
/// call.
__device__ __forceinline__ void mark(const Context& context, Mark moment, int thread = 0) {
  if (context.trace != nullptr && threadIdx.x == thread && blockIdx.x < kMostTracedBlocks)
    context.trace[moment * kMostTracedBlocks + blockIdx.x] = device::now_ns();
}

/// Remembers an id that is out of range; it counts as "no selection".
__device__ __noinline__ inline void note_invalid_id(Notices& notices, ExpertIds ids,
                                                    std::int64_t i) {
  atomicAdd(&notices.invalid_ids, 1ULL);
  if (atomicCAS(&notices.first_invalid_at, 0ULL, static_cast<unsigned long long>(i) + 1) == 0)
    notices.first_invalid_id = ids.wide ? static_cast<const std::int64_t*>(ids.data)[i]
                                        : static_cast<const std::int32_t*>(ids.data)[i];
}

/// What the threads of a block learn from one of them before anything else.
struct Entry {
  Epoch send;
  Epoch receive;
  bool usable;
};

/// First thing in a kernel. All threads call.
template <class Params>
__device__ __forceinline__ void start(const Params& p) {
#if defined(EXPERTWIRE_TEST_FAULTS)
  if (threadIdx.x == 0) BlockFaults::chosen() = {p.context.removed, p.context.longest_delay_ns};
  __syncthreads();
#endif
  mark(p.context, kStarted);
}

/// Reads the epochs once, before anybody can advance them. All threads call, after start().
__device__ __forceinline__ Entry enter(const Context& context,
                                       const Direction<KernelAccess>& lane) {
  __shared__ Entry entry;
  if (threadIdx.x == 0)
    entry = {lane.sending(), lane.receiving(),
             device::load_relaxed_system(&context.words->failed) == 0};
  __syncthreads();
  return entry;
}

/// Test builds: whether this rank is to vanish here. Its later kernels vanish, too: they would work
/// on what this one has not written.
__device__ __forceinline__ bool stops(const Context& context, Phase phase) {
#if defined(EXPERTWIRE_TEST_FAULTS)
  const bool stop = context.stop_at == static_cast<std::int32_t>(phase);
  if (stop) device::store_release_system(&context.words->failed, 1);
  return stop;
#else
  return false;
#endif
}

/// The credit of the peer of a thread's number; asked for early, together with other things.
__device__ __forceinline__ Epoch peek_credit(const Context& context,
                                             const Direction<KernelAccess>& lane) {
  const auto peer = static_cast<int>(threadIdx.x);
  return peer < context.size ? lane.credit_of(peer) : 0;
}

/// What a kernel must know before it writes to others, with peek_credit().
struct Peeked {
  Epoch send, receive, credit;
  std::uint32_t failed;
};
__device__ __forceinline__ Peeked peek(const Context& context,
                                       const Direction<KernelAccess>& lane) {
  static_assert(kMostRanks <= 512, "a thread a peer");
  const auto peer = static_cast<int>(threadIdx.x);
  if (peer >= context.size) return {};
  return {lane.sending(), lane.receiving(), lane.credit_of(peer),
          device::load_relaxed_system(&context.words->failed)};
}

/// Waits for credit of every peer. All threads call; true on all, or false on all.
__device__ __forceinline__ bool await_credits(const Context& context,
                                              const Direction<KernelAccess>& lane, Epoch n,
                                              Epoch peeked) {
  const auto peer = static_cast<int>(threadIdx.x);
  const bool good =
      peer >= context.size || lane.allows(peeked, n) ||
      wait_until(context, peer, Phase::credit, n, [&] { return lane.may_write(peer, n); });
  return __syncthreads_and(good);
}

/// enter() and await_credits() behind one barrier; not usable if credit did not come.
__device__ __forceinline__ Entry admit(const Context& context, const Direction<KernelAccess>& lane,
                                       const Peeked& peeked) {
  __shared__ Entry entry;
  const auto peer = static_cast<int>(threadIdx.x);
  const Epoch n = peeked.send;
  bool good = true;
  if (peer == 0) entry = {n, peeked.receive, true};
  if (peer < context.size)
    good = peeked.failed == 0 &&
           (lane.allows(peeked.credit, n) ||
            wait_until(context, peer, Phase::credit, n, [&] { return lane.may_write(peer, n); }));
  good = __syncthreads_and(good);
  return {entry.send, entry.receive, good};
}

/// Waits for up to kMost values of epoch `n`: `word(i)` is null where there is none, and told by
/// `peer(i)`. Called by one thread, or by several for words of their own. All are asked for
/// together, and as long as one is waited for, so are the others.
template <int kMost, class WordOf, class PeerOf>
__device__ __forceinline__ bool await_told(const Context& context, Epoch n, WordOf word,
                                           PeerOf peer, std::int32_t* values) {
  const Tagged* words[kMost];
#pragma unroll
  for (int i = 0; i < kMost; ++i) words[i] = word(i);
  int awaited = peer(0);
  return wait_until(context, awaited, Phase::counts, n, [&] {
    Tagged seen[kMost] = {};
#pragma unroll
    for (int i = 0; i < kMost; ++i)
      if (words[i] != nullptr) seen[i] = KernelAccess::load(words[i]);
    bool all = true;
#pragma unroll
    for (int i = kMost - 1; i >= 0; --i) {
      if (words[i] == nullptr) continue;
      if (belongs_to(seen[i], n)) {
        values[i] = seen[i].value;
      } else {
        all = false;
        awaited = peer(i);
      }
    }
    return all;
  });
}

/// The end of a receive half. All threads of all blocks call; the last block tells every peer that
/// epoch `n` has been read (unless `keep`, when a later release does), and advances the counter; of
/// the send half too, if the kernel did `both`. Returns true in all threads of that last block.
__device__ __forceinline__ bool leave_receive(const Context& context,
                                              const Direction<KernelAccess>& lane,
                                              const DirectionSlots& place, Epoch n, bool keep,
                                              bool both) {
  __syncthreads();
  const bool last = __syncthreads_or(threadIdx.x == 0 && lane.last_to_receive(gridDim.x));
  if (!last) return false;
#pragma unroll 1
  for (int peer = threadIdx.x; peer < context.size && !keep; peer += blockDim.x)
    grant(context, peer, place, n);
  __syncthreads();
  if (threadIdx.x == 0) {
    lane.end_receive(n);
    if (both) lane.end_send(n);
  }
  return true;
}

/// The same by one warp, when its block has read all.
__device__ __forceinline__ void leave_receive_by_warp(const Context& context,
                                                      const Direction<KernelAccess>& lane,
                                                      const DirectionSlots& place, Epoch n,
                                                      bool both) {
  const int thread = static_cast<int>(threadIdx.x) % 32;
  if (!__any_sync(kAllLanes, thread == 0 && lane.last_to_receive(gridDim.x))) return;
  __syncwarp();  // what one lane acquired, all may release
#pragma unroll 1
  for (int peer = thread; peer < context.size; peer += 32) grant(context, peer, place, n);
  if (thread != 0) return;
  lane.end_receive(n);
  if (both) lane.end_send(n);
}

__device__ __forceinline__ void leave_send(const Direction<KernelAccess>& lane, Epoch n) {
  __syncthreads();
  if (threadIdx.x == 0) lane.finish_send(n, gridDim.x);
}

}  // namespace expertwire::ep::cuda
