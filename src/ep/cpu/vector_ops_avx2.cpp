#include "ep/cpu/vector_loops.hpp"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#endif

namespace expertwire::inline v0::ep::cpu {

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

namespace {

struct Avx2Simd {
  static constexpr std::size_t kLanes = 8;
  static constexpr std::size_t kBytes = 32;
  using Register = __m256;

  static Register zero() { return _mm256_setzero_ps(); }
  static Register fill(float value) { return _mm256_set1_ps(value); }
  static Register load(Fp32, const char* at) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
  }
  static Register load(Bf16, const char* at) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }
  static Register load(Fp16, const char* at) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }
  static Register fma(Register a, Register b, Register c) { return _mm256_fmadd_ps(a, b, c); }
  static void store(Fp32, void* out, Register r, bool stream) {
    if (stream)
      _mm256_stream_ps(static_cast<float*>(out), r);
    else
      _mm256_storeu_ps(static_cast<float*>(out), r);
  }
  static void store(Bf16, void* out, Register r, bool stream) {
    const __m256i bits = _mm256_castps_si256(r);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i number = _mm256_srli_epi32(rounded, 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(r, r, _CMP_UNORD_Q));
    const __m256i lanes = _mm256_blendv_epi8(number, _mm256_set1_epi32(0x7FFF), nan);
    const __m256i packed =
        _mm256_permute4x64_epi64(_mm256_packus_epi32(lanes, _mm256_setzero_si256()), 0b11011000);
    auto* target = static_cast<__m128i*>(out);
    if (stream)
      _mm_stream_si128(target, _mm256_castsi256_si128(packed));
    else
      _mm_storeu_si128(target, _mm256_castsi256_si128(packed));
  }
  static void store(Fp16, void* out, Register r, bool stream) {
    const __m128i number = _mm256_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(r, r, _CMP_UNORD_Q));
    const __m128i is_nan =
        _mm_packs_epi32(_mm256_castsi256_si128(nan), _mm256_extracti128_si256(nan, 1));
    const __m128i halves = _mm_blendv_epi8(number, _mm_set1_epi16(0x7FFF), is_nan);
    auto* target = static_cast<__m128i*>(out);
    if (stream)
      _mm_stream_si128(target, halves);
    else
      _mm_storeu_si128(target, halves);
  }
  static void stream_bytes(char* to, const char* from) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static void store_fence() { _mm_sfence(); }
};

constexpr VectorOps kOps = make_ops<Avx2Simd>("avx2");

}  // namespace

const VectorOps* avx2_ops() {
  return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0 &&
                 __builtin_cpu_supports("f16c") != 0
             ? &kOps
             : nullptr;
}

#else

const VectorOps* avx2_ops() { return nullptr; }

#endif

}  // namespace expertwire::ep::cpu
