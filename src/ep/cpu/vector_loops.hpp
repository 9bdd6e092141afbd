#pragma once

// The loops of VectorOps, written once over `Simd`: a register of kLanes floats and how to load,
// store, round and multiply-add it. Included by one source file for each instruction set, in an
// unnamed namespace, so that code for one machine cannot replace another's.

#include <cstring>

#include "ep/cpu/vector_ops.hpp"

namespace expertwire::ep::cpu {
namespace {

template <class Simd>
void copy_rows(void* const* to, int count, const void* from, std::size_t bytes, bool stream) {
  constexpr std::size_t kStep = Simd::kBytes;
  const auto* source = static_cast<const char*>(from);
  bool aligned = true;
  for (int i = 0; i < count; ++i)
    aligned = aligned && reinterpret_cast<std::uintptr_t>(to[i]) % kStep == 0;
  if (!(stream && aligned)) {
    for (int i = 0; i < count; ++i) std::memcpy(to[i], source, bytes);
    return;
  }
  const std::size_t whole = bytes / kStep * kStep;
  for (int i = 0; i < count; ++i) {
    auto* target = static_cast<char*>(to[i]);
    for (std::size_t at = 0; at < whole; at += kStep) {
      if (i == 0) __builtin_prefetch(source + at + 4096, 0, 2);  // the next row often lies behind
      Simd::stream_bytes(target + at, source + at);
    }
    std::memcpy(target + whole, source + whole, bytes - whole);
  }
}

template <class Simd, bool kIsBf16>
void sum_loop(const SumRequest& r) {
  constexpr std::size_t kSize = kIsBf16 ? 2 : 4;
  constexpr std::size_t kLanes = Simd::kLanes;
  auto load = [](const void* row, std::size_t element) {
    const auto* at = static_cast<const char*>(row) + element * kSize;
    if constexpr (kIsBf16)
      return Simd::load_bf16(at);
    else
      return Simd::load_fp32(at);
  };
  const bool stream = r.stream && reinterpret_cast<std::uintptr_t>(r.out) % (kLanes * kSize) == 0;
  auto step = [&](std::size_t element, void* out, bool past_caches) {
    auto acc = r.init != nullptr ? load(r.init, element) : Simd::zero();
    for (int i = 0; i < r.count; ++i) {
      // Rows lie far apart, and the hardware stops at page ends: ask for the next page early.
      __builtin_prefetch(static_cast<const char*>(r.rows[i]) + element * kSize + 4096, 0, 2);
      const auto weight = Simd::fill(r.weights != nullptr ? r.weights[i] : 1.0F);
      acc = Simd::fma(weight, load(r.rows[i], element), acc);
    }
    if constexpr (kIsBf16)
      Simd::store_bf16(out, acc, past_caches);
    else
      Simd::store_fp32(out, acc, past_caches);
  };
  std::size_t element = 0;
  for (; element + kLanes <= r.elements; element += kLanes)
    step(element, static_cast<char*>(r.out) + element * kSize, stream);
  if (element == r.elements) return;

  // The last lanes go through copies, so that nothing past a row's end is touched.
  const std::size_t rest = (r.elements - element) * kSize;
  constexpr std::size_t kMostRows = 33;
  alignas(64) char tails[kMostRows][64] = {};
  alignas(64) char result[64];
  const void* rows[kMostRows];
  SumRequest tail = r;
  for (int i = 0; i < r.count; ++i) {
    std::memcpy(tails[i], static_cast<const char*>(r.rows[i]) + element * kSize, rest);
    rows[i] = tails[i];
  }
  if (r.init != nullptr) {
    std::memcpy(tails[kMostRows - 1], static_cast<const char*>(r.init) + element * kSize, rest);
    tail.init = tails[kMostRows - 1];
  }
  tail.rows = rows;
  tail.out = result;
  tail.elements = kLanes;
  tail.stream = false;
  sum_loop<Simd, kIsBf16>(tail);
  std::memcpy(static_cast<char*>(r.out) + element * kSize, result, rest);
}

template <class Simd>
void sum_rows(const SumRequest& request) {
  if (request.dtype == DType::bf16)
    sum_loop<Simd, true>(request);
  else
    sum_loop<Simd, false>(request);
}

template <class Simd>
constexpr VectorOps make_ops(const char* name) {
  return {name, &copy_rows<Simd>, &sum_rows<Simd>, &Simd::store_fence};
}

}  // namespace
}  // namespace expertwire::ep::cpu
