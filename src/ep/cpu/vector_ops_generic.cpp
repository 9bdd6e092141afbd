#include <cmath>

#include "ep/cpu/vector_loops.hpp"

namespace expertwire::inline v0::ep::cpu {

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
  template <class Element>
  static Register load(Element, const char* at) {
    typename Element::Bits raw[kLanes];
    std::memcpy(raw, at, sizeof(raw));
    Register r;
    for (std::size_t i = 0; i < kLanes; ++i) r.lane[i] = Element::value(raw[i]);
    return r;
  }
  static Register fma(const Register& a, const Register& b, const Register& c) {
    Register r;
    for (std::size_t i = 0; i < kLanes; ++i) r.lane[i] = std::fma(a.lane[i], b.lane[i], c.lane[i]);
    return r;
  }
  template <class Element>
  static void store(Element, void* out, const Register& r, bool) {
    typename Element::Bits raw[kLanes];
    for (std::size_t i = 0; i < kLanes; ++i) raw[i] = Element::round(r.lane[i]);
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
