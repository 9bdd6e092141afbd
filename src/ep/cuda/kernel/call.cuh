#pragma once

// How kernels tell each other what their operation is about, and compare (see
// ep/protocol/call.hpp).

#include "ep/cuda/kernel/entry.cuh"

namespace expertwire::inline v0::ep::cuda {

/// What this rank's operation `n` is about.
struct Saying {
  const Context& context;
  const DirectionSlots& place;
  Epoch n;
  const Call& call;
  Epoch dispatch;

  __device__ std::int32_t word(int i) const { return call.word(i, dispatch); }
  __device__ const Tagged* heard_from(int source, Epoch epoch) const {
    return inbox<CallLine>(context, source, place.header_of(epoch))->words;
  }
};

/// Tells every rank; after credit, `threads` threads of the first block.
__device__ __forceinline__ void tell_call(const Saying& s, int thread, int threads) {
#pragma unroll 1
  for (int i = thread; i < s.context.size * Call::kWords; i += threads) {
    const int peer = i / Call::kWords, word = i % Call::kWords;
    tell(s.context, peer, s.place.header_of(s.n), word, {s.word(word), s.n});
  }
}

/// Compares what a source told; false after a report.
__device__ __forceinline__ bool belongs(const Saying& s, int source, const std::int32_t* told) {
#pragma unroll
  for (int i = 0; i < Call::kWords; ++i) {
    if (Call::agree(i, told[i], s.word(i))) continue;
    report_failure(s.context,
                   {ErrorCode::mismatch, Phase::counts, source, {i, told[i], s.word(i)}, s.n, 0});
    return false;
  }
  return true;
}

/// Waits for what a source tells, and compares it; a thread a source.
__device__ __forceinline__ bool compare_call(const Saying& s, int source) {
  std::int32_t told[Call::kWords];
  return await_told<Call::kWords>(
             s.context, s.n, [&](int i) { return s.heard_from(source, s.n) + i; },
             [&](int) { return source; }, told) &&
         belongs(s, source, told);
}

/// The same of two operations ago: everybody has told, since there is credit for this one.
__device__ __forceinline__ bool compare_earlier_call(const Saying& s, int source) {
  const Epoch earlier = s.n - kSlots;
  const Tagged* theirs = s.heard_from(source, earlier);
  const Tagged* ours = s.heard_from(s.context.rank, earlier);
#pragma unroll  // all loads together
  for (int i = 0; i < Call::kWords; ++i) {
    const Tagged a = KernelAccess::load(theirs + i), b = KernelAccess::load(ours + i);
    if (!belongs_to(a, earlier) || !belongs_to(b, earlier) || Call::agree(i, a.value, b.value))
      continue;
    report_failure(s.context,
                   {ErrorCode::mismatch, Phase::counts, source, {i, a.value, b.value}, earlier, 0});
    return false;
  }
  return true;
}

/// Compares the calls of those that rows come from now, and of the others two operations on. One
/// warp, after all credit; false on all lanes if a call does not belong to this one.
template <class Sends>
__device__ __forceinline__ bool compare_calls(const Saying& s, Sends sends) {
  bool good = true;
#pragma unroll 1
  for (int source = static_cast<int>(threadIdx.x) % 32; source < s.context.size && good;
       source += 32)
    good = compare_earlier_call(s, source) && (!sends(source) || compare_call(s, source));
  return __all_sync(kAllLanes, good);
}

}  // namespace expertwire::ep::cuda
