#pragma once

#include <cstdint>
#include <initializer_list>

namespace expertwire::reference {

/// A small generator whose streams are told apart by any number of keys, so that every rank can
/// make every other rank's data.
class Random {
 public:
  Random(std::initializer_list<std::uint64_t> keys) {
    for (std::uint64_t key : keys) state_ = mix(state_ ^ mix(key + 0x9E3779B97F4A7C15ULL));
  }
  std::uint64_t next() {
    state_ += 0x9E3779B97F4A7C15ULL;
    return mix(state_);
  }
  /// In [0, 1).
  double uniform() { return static_cast<double>(next() >> 11) * 0x1.0p-53; }
  /// In [0, n).
  int below(int n) { return static_cast<int>(next() % static_cast<std::uint64_t>(n)); }
  bool chance(double p) { return uniform() < p; }

 private:
  static std::uint64_t mix(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
  }
  std::uint64_t state_ = 0x243F6A8885A308D3ULL;
};

}  // namespace expertwire::reference
