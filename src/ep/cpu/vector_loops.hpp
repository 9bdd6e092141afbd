#pragma once

// The loops of VectorOps, written once over `Simd`, a register of kLanes floats and how to load,
// store, round and multiply-add it, and over the elements. Included by one source file for each
// instruction set, in an unnamed namespace, so that code for one machine cannot replace another's.

#include <algorithm>
#include <bit>
#include <cstring>

#include "ep/cpu/elements.hpp"
#include "ep/cpu/vector_ops.hpp"
#include "ep/protocol/row_format.hpp"

namespace expertwire::inline v0::ep::cpu {
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

template <class Simd, class Element>
void sum_loop(const SumRequest& r) {
  constexpr std::size_t kSize = sizeof(typename Element::Bits);
  constexpr std::size_t kLanes = Simd::kLanes;
  auto load = [](const void* row, std::size_t element) {
    return Simd::load(Element{}, static_cast<const char*>(row) + element * kSize);
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
    Simd::store(Element{}, out, acc, past_caches);
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
  sum_loop<Simd, Element>(tail);
  std::memcpy(static_cast<char*>(r.out) + element * kSize, result, rest);
}

template <class Simd>
void sum_rows(const SumRequest& request) {
  with_element(request.dtype, [&](auto element) { sum_loop<Simd, decltype(element)>(request); });
}

/// Round to nearest even, saturating at 448; without branches, so that compilers use vectors.
inline std::uint8_t to_e4m3(float value) {
  constexpr std::uint32_t kSign = 0x80000000, kLargest = 0x7E, kNan = 0x7F;
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t size = bits & ~kSign;
  // Numbers of 2^-6 and more keep 3 bits behind their leading one. Smaller ones are multiples of
  // 2^-9, to which adding 2^14 rounds.
  const std::uint32_t normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - ((127 - 7) << 3);
  constexpr float kMagic = 16384;
  const std::uint32_t small = std::bit_cast<std::uint32_t>(std::bit_cast<float>(size) + kMagic) -
                              std::bit_cast<std::uint32_t>(kMagic);
  std::uint32_t code = size < 0x3C800000 ? small : std::min(normal, kLargest);
  code = size > 0x7F800000 ? kNan : code | (bits >> 24 & 0x80);
  return static_cast<std::uint8_t>(code);
}

/// One group of channels; its size is a constant in almost all calls, for the compiler's sake.
template <class Element>
inline void cast_group(const CastRequest& r, std::size_t first, std::size_t count) {
  float x[kScaleChannels];
  const auto* in = static_cast<const typename Element::Bits*>(r.x) + first;
  for (std::size_t i = 0; i < count; ++i) x[i] = Element::value(in[i]);
  // As bits, sizes of numbers compare as integers do; what is no number is left out.
  constexpr std::uint32_t kInfinity = 0x7F800000;
  std::uint32_t most_bits = std::bit_cast<std::uint32_t>(1e-4F);
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint32_t size = std::bit_cast<std::uint32_t>(x[i]) & 0x7FFFFFFF;
    most_bits = std::max(most_bits, size > kInfinity ? 0 : size);
  }
  constexpr float kLargest = 448;
  const auto most = std::bit_cast<float>(most_bits);
  const float inverse = kLargest / most;
  r.scales[first / kScaleChannels] = most / kLargest;
  auto* out = static_cast<std::uint8_t*>(r.out) + first;
  for (std::size_t i = 0; i < count; ++i) out[i] = to_e4m3(x[i] * inverse);
}

template <class Element>
void cast_loop(const CastRequest& r) {
  std::size_t first = 0;
  for (; first + kScaleChannels <= r.elements; first += kScaleChannels)
    cast_group<Element>(r, first, kScaleChannels);
  if (first < r.elements) cast_group<Element>(r, first, r.elements - first);
}

template <class Simd>
void cast_row(const CastRequest& request) {
  with_element(request.dtype, [&](auto element) { cast_loop<decltype(element)>(request); });
}

template <class Simd>
constexpr VectorOps make_ops(const char* name) {
  return {name, &copy_rows<Simd>, &sum_rows<Simd>, &cast_row<Simd>, &Simd::store_fence};
}

}  // namespace
}  // namespace expertwire::ep::cpu
