#pragma once

// What trips of both modes are made of: inputs, and comparisons with the oracle.

#include <fmt/format.h>

#include <cstring>

#include "reference/round_trip.hpp"
#include "reference/space.hpp"

namespace expertwire::reference {

inline std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

/// Compares values and remembers the first that is wrong.
class Checker {
 public:
  explicit Checker(int rank) : rank_(rank) {}

  template <class T>
  void same(const char* what, std::int64_t row, std::int64_t column, T got, T want) {
    ++report_.checked;
    if (got != want) wrong(what, row, column, got, want);
  }
  /// A row of H values, compared as bits.
  void same_row(const char* what, std::int64_t row, DType dtype, const std::byte* got,
                const std::byte* want, std::size_t elements) {
    const std::size_t size = size_of(dtype);
    if (std::memcmp(got, want, elements * size) == 0) {
      report_.checked += static_cast<std::int64_t>(elements);
      return;
    }
    const Row a = decode(dtype, got, elements), b = decode(dtype, want, elements);
    for (std::size_t h = 0; h < elements; ++h) {
      ++report_.checked;
      if (std::memcmp(got + h * size, want + h * size, size) != 0)
        wrong(what, row, static_cast<std::int64_t>(h), a[h], b[h]);
    }
  }
  const Report& report() const { return report_; }

 private:
  template <class T>
  void wrong(const char* what, std::int64_t row, std::int64_t column, T got, T want) {
    if (report_.wrong++ == 0)
      report_.first_wrong =
          fmt::format("rank {}: {}[{}, {}] is {}, must be {}", rank_, what, row, column, got, want);
  }

  int rank_;
  Report report_;
};

/// Inputs of one call, in the form that the options ask for, and their likeness on the host.
struct TripInput {
  RankInput input;
  ConstTensorView x, x_scales, topk_idx, topk_weights, bias;

  TripInput(Tensors& tensors, const Workload& workload, int rank, int step,
            const RoundTripOptions& options);
};

bool is_fp8(const RoundTripOptions& options);

/// One received row against the token's own, or against its fp8 form.
void check_dispatched(Checker& check, const Oracle& oracle, int source, int token,
                      const TensorView& x, const TensorView& scales, std::int64_t row);

/// How many tokens came from the sources before each.
void check_sources(Checker& check, const Oracle& oracle, int rank, const TensorView& offsets);

/// What came home, and what it must be.
struct Home {
  const TensorView& out;
  Oracle::Weights weights;
  bool bias;
  Oracle::Layout layout;
  const Capacities* capacities;
};
void check_combined(Checker& check, const Oracle& oracle, const Workload& workload, int rank,
                    const Home& home);

/// round_trip() with Layout::expert_major.
Report grouped_trip(HighThroughput& object, const Communicator& communicator,
                    const Workload& workload, int step, const RoundTripOptions& options);

}  // namespace expertwire::reference
