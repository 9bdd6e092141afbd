#pragma once

// The words that kernels are written in: one function an instruction, named for what it does. All
// PTX of expertwire is in this folder.

#include <cstdint>

namespace expertwire::device {

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

/// Reads or writes a word without ordering anything else.
__device__ __forceinline__ std::uint32_t load_relaxed_system(const std::uint32_t* word) {
  std::uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
__device__ __forceinline__ void store_relaxed_system(std::uint32_t* word, std::uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" : : "l"(word), "r"(value) : "memory");
}

/// Adds one and returns the value before; orders this thread with the others that count there.
__device__ __forceinline__ std::uint32_t count_up_gpu(std::uint32_t* word) {
  std::uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(word)
               : "memory");
  return before;
}

/// Nanoseconds of a clock that all SMs share.
__device__ __forceinline__ std::uint64_t now_ns() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

}  // namespace expertwire::device
