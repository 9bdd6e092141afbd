#pragma once

// Rows as 16-byte vectors: copies and sums by a team of threads. What the CPU backend's vector_ops
// are to its loops.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

#include "expertwire/dtype.hpp"

namespace expertwire::inline v0::ep::cuda {

/// A vector's elements in fp32, and how they go back: round to nearest even. The CPU backend has
/// the same names in ep/cpu/elements.hpp.
struct Bf16 {
  static constexpr int kLanes = 8;
  __device__ static void values(const uint4& vector, float* out) {
    const std::uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = __uint_as_float(words[i] << 16);
      out[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000U);
    }
  }
  __device__ static void add(float weight, const uint4& vector, float* acc) {
    const std::uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      acc[2 * i] = __fmaf_rn(weight, __uint_as_float(words[i] << 16), acc[2 * i]);
      acc[2 * i + 1] = __fmaf_rn(weight, __uint_as_float(words[i] & 0xFFFF0000U), acc[2 * i + 1]);
    }
  }
  __device__ static uint4 round(const float* acc) {
    std::uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(acc[2 * i], acc[2 * i + 1]);
      words[i] = *reinterpret_cast<const std::uint32_t*>(&pair);
    }
    return {words[0], words[1], words[2], words[3]};
  }
};

struct Fp16 {
  static constexpr int kLanes = 8;
  __device__ static void values(const uint4& vector, float* out) {
    const std::uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      out[2 * i] = pair.x;
      out[2 * i + 1] = pair.y;
    }
  }
  __device__ static void add(float weight, const uint4& vector, float* acc) {
    float x[kLanes];
    values(vector, x);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) acc[i] = __fmaf_rn(weight, x[i], acc[i]);
  }
  __device__ static uint4 round(const float* acc) {
    std::uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __half2 pair = __floats2half2_rn(acc[2 * i], acc[2 * i + 1]);
      words[i] = *reinterpret_cast<const std::uint32_t*>(&pair);
    }
    return {words[0], words[1], words[2], words[3]};
  }
};

struct Fp32 {
  static constexpr int kLanes = 4;
  __device__ static void values(const uint4& vector, float* out) {
    out[0] = __uint_as_float(vector.x);
    out[1] = __uint_as_float(vector.y);
    out[2] = __uint_as_float(vector.z);
    out[3] = __uint_as_float(vector.w);
  }
  __device__ static void add(float weight, const uint4& vector, float* acc) {
    acc[0] = __fmaf_rn(weight, __uint_as_float(vector.x), acc[0]);
    acc[1] = __fmaf_rn(weight, __uint_as_float(vector.y), acc[1]);
    acc[2] = __fmaf_rn(weight, __uint_as_float(vector.z), acc[2]);
    acc[3] = __fmaf_rn(weight, __uint_as_float(vector.w), acc[3]);
  }
  __device__ static uint4 round(const float* acc) {
    return {__float_as_uint(acc[0]), __float_as_uint(acc[1]), __float_as_uint(acc[2]),
            __float_as_uint(acc[3])};
  }
};

/// The only switch on a dtype of this backend: calls `visit` with its element. Launches use it to
/// choose a kernel, since one kernel for all elements is slower for each: it spills more, and short
/// kernels wait for every line of their code.
#pragma nv_exec_check_disable
template <class Visit>
__host__ __device__ __forceinline__ auto with_element(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::bf16:
      return visit(Bf16{});
    case DType::fp16:
      return visit(Fp16{});
    default:
      return visit(Fp32{});
  }
}

/// Calls `prepare` with every element until one returns an error; kernels are loaded before a call
/// needs them.
template <class Prepare>
cudaError_t for_each_element(Prepare prepare) {
  for (const cudaError_t result : {prepare(Bf16{}), prepare(Fp16{}), prepare(Fp32{})})
    if (result != cudaSuccess) return result;
  return cudaSuccess;
}

/// Vectors that a thread has in flight at once.
inline constexpr int kInFlight = 4;

/// The part of a row that a thread of a team holds in registers: loaded early, written late.
struct HeldRow {
  static constexpr int kMost = 8;
  uint4 held[kMost];

  __device__ __forceinline__ void load(const void* from, int vectors, int thread, int threads) {
#pragma unroll
    for (int i = 0; i < kMost; ++i)
      if (thread + i * threads < vectors)
        held[i] = static_cast<const uint4*>(from)[thread + i * threads];
  }
  /// A value that is known when all of it has come.
  __device__ __forceinline__ std::uint32_t digest(int vectors, int thread, int threads) const {
    std::uint32_t all = 0;
#pragma unroll
    for (int i = 0; i < kMost; ++i)
      if (thread + i * threads < vectors) all ^= held[i].x;
    return all;
  }
  __device__ __forceinline__ void store(void* to, int vectors, int thread, int threads) const {
    uint4* at = static_cast<uint4*>(to) + thread;
    int left = vectors - thread;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (left <= 0) return;
      *at = held[i];
      at += threads;
      left -= threads;
    }
  }
};

/// Copies a row of `vectors` vectors to `count` places; `place(i)` gives them, null for none. Its
/// first vectors are in `row` already.
template <class Place>
__device__ __forceinline__ void copy_held_row(HeldRow& row, const void* from, int vectors,
                                              int thread, int threads, int count, Place place) {
#pragma unroll 1
  for (int first = 0;;) {
#pragma unroll 1
    for (int i = 0; i < count; ++i)
      if (void* to = place(i))
        row.store(static_cast<uint4*>(to) + first, vectors - first, thread, threads);
    first += HeldRow::kMost * threads;
    if (first >= vectors) return;
    row.load(static_cast<const uint4*>(from) + first, vectors - first, thread, threads);
  }
}

}  // namespace expertwire::ep::cuda
