#pragma once

// The words that kernels are written in: one function an instruction, named for what it does. All
// PTX of expertwire is in this folder.

#include <cstdint>

namespace expertwire::inline v0::device {

/// Every lane of a warp, as shuffles and votes want it.
inline constexpr unsigned kAllLanes = 0xFFFFFFFFU;

/// Reads a word; what its writer wrote before releasing it is visible to this thread afterwards,
/// and to the threads of this block after a barrier. System scope: the writer may be another GPU or
/// a CPU.
__device__ __forceinline__ std::uint32_t load_acquire_system(const std::uint32_t* word) {
  std::uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

/// Writes a word after everything that this thread wrote, and that its block wrote before the last
/// barrier, is visible to whoever acquires it.
__device__ __forceinline__ void store_release_system(std::uint32_t* word, std::uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" : : "l"(word), "r"(value) : "memory");
}

__device__ __forceinline__ void store_release_system(std::uint64_t* word, std::uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" : : "l"(word), "l"(value) : "memory");
}

/// Adds to a word of any rank's memory, ordered like a release store.
__device__ __forceinline__ void add_release_system(std::uint64_t* word, std::uint64_t value) {
  asm volatile("red.release.sys.global.add.u64 [%0], %1;" : : "l"(word), "l"(value) : "memory");
}

/// Reads or writes a word without ordering anything else.
__device__ __forceinline__ std::uint32_t load_relaxed_system(const std::uint32_t* word) {
  std::uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
__device__ __forceinline__ void store_relaxed_system(std::uint32_t* word, std::uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" : : "l"(word), "r"(value) : "memory");
}

/// Two words side by side, each read or written as a whole; 16-byte aligned.
struct Words {
  std::uint64_t low, high;
};
__device__ __forceinline__ Words load_relaxed_system(const Words* words) {
  Words w;
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];"
               : "=l"(w.low), "=l"(w.high)
               : "l"(words)
               : "memory");
  return w;
}
__device__ __forceinline__ void store_relaxed_system(Words* words, const Words& w) {
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};"
               :
               : "l"(words), "l"(w.low), "l"(w.high)
               : "memory");
}

/// Orders what this thread, and those it has learnt from, did before it with what it does after,
/// for this GPU or for all.
__device__ __forceinline__ void fence_gpu() { asm volatile("fence.acq_rel.gpu;" : : : "memory"); }
__device__ __forceinline__ void fence_system() {
  asm volatile("fence.acq_rel.sys;" : : : "memory");
}

/// Adds and returns the value before; orders this thread with the others that add there.
__device__ __forceinline__ std::uint32_t add_gpu(std::uint32_t* word, std::uint32_t count) {
  std::uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(word), "r"(count)
               : "memory");
  return before;
}

__device__ __forceinline__ std::uint64_t load_relaxed_system(const std::uint64_t* word) {
  std::uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}

__device__ __forceinline__ void store_relaxed_system(std::uint64_t* word, std::uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" : : "l"(word), "l"(value) : "memory");
}

/// Nanoseconds of a clock that all SMs share.
__device__ __forceinline__ std::uint64_t now_ns() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

/// Barrier `kId` (1 to 15) of `threads` threads of the block, a multiple of 32.
template <int kId>
__device__ __forceinline__ void barrier_sync(int threads) {
  asm volatile("barrier.sync %0, %1;" : : "n"(kId), "r"(threads) : "memory");
}

/// Arrives at such a barrier without waiting: those who sync there see what this thread wrote.
template <int kId>
__device__ __forceinline__ void barrier_arrive(int threads) {
  asm volatile("barrier.arrive %0, %1;" : : "n"(kId), "r"(threads) : "memory");
}
/// Syncs, and says whether `value` was true on all threads.
template <int kId>
__device__ __forceinline__ bool barrier_and(int threads, bool value) {
  std::uint32_t all = 0;
  asm volatile(
      "{ .reg .pred p, q; setp.ne.u32 p, %1, 0; barrier.red.and.pred q, %2, %3, p; "
      "selp.u32 %0, 1, 0, q; }"
      : "=r"(all)
      : "r"(value ? 1U : 0U), "n"(kId), "r"(threads)
      : "memory");
  return all != 0;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890

/// Two fp8-e4m3 of two fp32 values, round to nearest even, saturating at 448; see fp8.cuh.
__device__ __forceinline__ std::uint16_t convert_e4m3x2(float low, float high) {
  std::uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

#endif

/// Asks for the 128 bytes around `address` to be brought to the L2 cache.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" : : "l"(address));
}

/// Whether this code may use bulk copies.
__device__ __forceinline__ constexpr bool has_bulk_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return true;
#else
  return false;
#endif
}

/// Between an acquire and a bulk copy of what it covers: the copy engine is another proxy.
__device__ __forceinline__ void let_bulk_copies_see() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async;" : : : "memory");
#endif
}

// Bulk copies (Hopper and later): one thread moves kilobytes between shared and global memory, the
// latter of any rank that is mapped here. Addresses and sizes are multiples of 16 bytes.

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void mbarrier_init(std::uint64_t* barrier, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
               :
               : "r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}

/// Ends a barrier's life, so that its memory can hold another.
__device__ __forceinline__ void mbarrier_invalidate(std::uint64_t* barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" : : "r"(shared_address(barrier)) : "memory");
}

/// Makes what this thread wrote to shared memory, initialised barriers too, visible to the copy
/// engine.
__device__ __forceinline__ void fence_proxy_async_shared() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
#endif
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/// Arrives, and says how many bytes the barrier's phase has to wait for besides.
__device__ __forceinline__ void mbarrier_expect(std::uint64_t* barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

/// Waits until the phase of parity `parity` is complete. What the copies brought is visible then.
/// Copies end by themselves, so this wait has no deadline.
__device__ __forceinline__ void mbarrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
  std::uint32_t done = 0;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (done == 0);
}

__device__ __forceinline__ void bulk_load(void* to_shared, const void* from_global,
                                          std::uint32_t bytes, std::uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      :
      : "r"(shared_address(to_shared)), "l"(__cvta_generic_to_global(from_global)), "r"(bytes),
        "r"(shared_address(barrier))
      : "memory");
}

__device__ __forceinline__ void bulk_store(void* to_global, const void* from_shared,
                                           std::uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
               :
               : "l"(__cvta_generic_to_global(to_global)), "r"(shared_address(from_shared)),
                 "r"(bytes)
               : "memory");
}

/// Closes the group of this thread's stores since the last one.
__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" : : : "memory");
}

/// Waits until all but the latest `kPending` groups of this thread are complete: their bytes are in
/// the memory of their destination, and a release of this thread covers them.
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" : : "n"(kPending) : "memory");
}

/// The same for a number that is known at run time, up to kMostPending.
inline constexpr int kMostPending = 3;
__device__ __forceinline__ void bulk_wait(int pending) {
  switch (pending) {
    case 0:
      return bulk_wait<0>();
    case 1:
      return bulk_wait<1>();
    case 2:
      return bulk_wait<2>();
    default:
      return bulk_wait<kMostPending>();
  }
}

#endif

}  // namespace expertwire::device
