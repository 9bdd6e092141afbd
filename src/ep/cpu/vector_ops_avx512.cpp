#include "ep/cpu/vector_loops.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace expertwire::inline v0::ep::cpu {

#if defined(__AVX512F__) && defined(__AVX512BW__)

namespace {

struct Avx512Simd {
  static constexpr std::size_t kLanes = 16;
  static constexpr std::size_t kBytes = 64;
  using Register = __m512;

  static Register zero() { return _mm512_setzero_ps(); }
  static Register fill(float value) { return _mm512_set1_ps(value); }
  static Register load(Fp32, const char* at) { return _mm512_loadu_ps(at); }
  static Register load(Bf16, const char* at) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }
  static Register load(Fp16, const char* at) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  }
  static Register fma(Register a, Register b, Register c) { return _mm512_fmadd_ps(a, b, c); }
  static void store(Fp32, void* out, Register r, bool stream) {
    if (stream)
      _mm512_stream_ps(static_cast<float*>(out), r);
    else
      _mm512_storeu_ps(out, r);
  }
  static void store(Bf16, void* out, Register r, bool stream) {
    const __m512i bits = _mm512_castps_si512(r);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(r, r, _CMP_UNORD_Q);
    const __m512i lanes =
        _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7FFF));
    const __m256i packed = _mm512_cvtepi32_epi16(lanes);
    auto* target = static_cast<__m256i*>(out);
    if (stream)
      _mm256_stream_si256(target, packed);
    else
      _mm256_storeu_si256(target, packed);
  }
  static void store(Fp16, void* out, Register r, bool stream) {
    const __m512i number = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT));
    const __mmask16 nan = _mm512_cmp_ps_mask(r, r, _CMP_UNORD_Q);
    const __m256i halves =
        _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(number, nan, _mm512_set1_epi32(0x7FFF)));
    auto* target = static_cast<__m256i*>(out);
    if (stream)
      _mm256_stream_si256(target, halves);
    else
      _mm256_storeu_si256(target, halves);
  }
  static void stream_bytes(char* to, const char* from) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
  }
  static void store_fence() { _mm_sfence(); }
};

constexpr VectorOps kOps = make_ops<Avx512Simd>("avx512");

}  // namespace

const VectorOps* avx512_ops() {
  return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0
             ? &kOps
             : nullptr;
}

#else

const VectorOps* avx512_ops() { return nullptr; }

#endif

}  // namespace expertwire::ep::cpu
