#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "reference/random.hpp"

namespace expertwire::reference {

/// How tokens choose experts. Parsed from what `--routing` takes:
///   uniform | balanced | lognormal:S | powerlaw:A | zipf:S | hotrank:P | grouped:N,K | masked:P |
///   trace:FILE
class RoutingPattern {
 public:
  /// Throws std::invalid_argument that lists what is allowed.
  static RoutingPattern parse(const std::string& text);

  struct Shape {
    int ranks;
    int experts;
    int top_k;
    std::uint64_t seed;
  };
  /// The K experts of one token, -1 where there is no selection. `popularity` is popularity(shape).
  std::vector<std::int64_t> draw(const Shape& shape, const std::vector<double>& popularity,
                                 std::int64_t token_of_job, Random& random) const;
  /// The weight with which each expert is chosen.
  std::vector<double> popularity(const Shape& shape) const;
  const std::string& text() const { return text_; }

 private:
  enum class Kind { uniform, balanced, lognormal, powerlaw, zipf, hotrank, grouped, masked, trace };
  Kind kind_ = Kind::uniform;
  double a_ = 0;
  double b_ = 0;
  std::string text_ = "uniform";
  std::vector<std::vector<std::int64_t>> trace_;
};

/// How uneven drawn selections are.
struct Skew {
  double expert_max_over_mean = 0;
  double rank_max_over_mean = 0;
};
Skew measure_skew(const std::vector<std::int64_t>& selections, int experts, int ranks);

}  // namespace expertwire::reference
