#pragma once

#include <algorithm>
#include <chrono>

namespace expertwire::inline v0 {

/// A point in time by which a wait must end. Every wait of expertwire has one.
class Deadline {
 public:
  using Clock = std::chrono::steady_clock;

  /// Budgets beyond a year count as a year.
  static Deadline after(std::chrono::milliseconds budget) {
    constexpr std::chrono::milliseconds kYear = std::chrono::hours(24 * 365);
    return Deadline(Clock::now() + std::min(budget, kYear), budget);
  }

  bool expired() const noexcept { return Clock::now() >= at_; }
  /// Time left, never negative.
  std::chrono::milliseconds remaining() const noexcept {
    auto left = std::chrono::duration_cast<std::chrono::milliseconds>(at_ - Clock::now());
    return left.count() > 0 ? left : std::chrono::milliseconds(0);
  }
  /// What the caller had asked for, for messages.
  std::chrono::milliseconds budget() const noexcept { return budget_; }

 private:
  Deadline(Clock::time_point at, std::chrono::milliseconds budget) : at_(at), budget_(budget) {}

  Clock::time_point at_;
  std::chrono::milliseconds budget_;
};

}  // namespace expertwire
