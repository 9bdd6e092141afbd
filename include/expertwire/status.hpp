#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "expertwire/error.hpp"

namespace expertwire::inline v0 {

/// What an object has noticed since it was made.
struct Status {
  /// Expert ids outside 0..E-1 and not -1. They were taken as "no selection".
  std::int64_t invalid_expert_ids = 0;
  /// Where the first of them was: "topk_idx[3, 1] = 999".
  std::string first_invalid_id;
  /// Low latency: rows past the R*M that an expert's output has room for. Only tokens that name an
  /// expert more than once can bring so many; combine takes the dropped ones as zero.
  std::int64_t dropped_rows = 0;
  /// The error after which the object can no longer be used, with its rank, peer and phase; none
  /// while it works.
  std::optional<Error> error;

  /// Throws the error, if there is one.
  void check() const {
    if (error) throw *error;
  }
};

}  // namespace expertwire
