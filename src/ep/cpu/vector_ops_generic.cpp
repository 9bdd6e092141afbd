#include <bit>
#include <cmath>

#include "ep/cpu/vector_loops.hpp"

namespace expertwire::ep::cpu {

namespace {

/// Plain C++ for every machine; also what sanitizer builds use, because they see its accesses.
struct GenericSimd {
  static constexpr std::size_t kLanes = 8;
  static constexpr std::size_t kBytes = 16;
  struct Register {
    float lane[kLanes];
  };

  static Register zero() { return {}; }
  static Register fill(float value) {
    Register r;
    for (float& lane : r.lane) lane = value;
    return r;
  }
  static Register load_fp32(const char* at) {
    Register r;
    std::memcpy(r.lane, at, sizeof(r.lane));
    return r;
  }
  static Register load_bf16(const char* at) {
    std::uint16_t raw[kLanes];
    std::memcpy(raw, at, sizeof(raw));
    Register r;
    for (std::size_t i = 0; i < kLanes; ++i)
      r.lane[i] = std::bit_cast<float>(static_cast<std::uint32_t>(raw[i]) << 16);
    return r;
  }
  static Register fma(const Register& a, const Register& b, const Register& c) {
    Register r;
    for (std::size_t i = 0; i < kLanes; ++i) r.lane[i] = std::fma(a.lane[i], b.lane[i], c.lane[i]);
    return r;
  }
  static void store_fp32(void* out, const Register& r, bool) {
    std::memcpy(out, r.lane, sizeof(r.lane));
  }
  static void store_bf16(void* out, const Register& r, bool) {
    std::uint16_t raw[kLanes];
    for (std::size_t i = 0; i < kLanes; ++i) {
      const auto bits = std::bit_cast<std::uint32_t>(r.lane[i]);
      const std::uint32_t rounded = bits + 0x7FFF + ((bits >> 16) & 1);
      raw[i] = static_cast<std::uint16_t>(std::isnan(r.lane[i]) ? 0x7FFF : rounded >> 16);
    }
    std::memcpy(out, raw, sizeof(raw));
  }
  static void stream_bytes(char* to, const char* from) { std::memcpy(to, from, kBytes); }
  static void store_fence() {}
};

constexpr VectorOps kOps = make_ops<GenericSimd>("generic");

}  // namespace

const VectorOps* generic_ops() { return &kOps; }

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
const VectorOps& vector_ops() { return kOps; }
#else
const VectorOps& vector_ops() {
  static const VectorOps& best = *(avx512_ops() != nullptr ? avx512_ops()
                                   : avx2_ops() != nullptr ? avx2_ops()
                                                           : generic_ops());
  return best;
}
#endif

}  // namespace expertwire::ep::cpu
