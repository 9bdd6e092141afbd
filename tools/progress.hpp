#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace expertwire::tools {

/// A line on a terminal that says how far long work has come; silent where stderr is no terminal.
class Progress {
 public:
  explicit Progress(std::string what);
  ~Progress();
  /// `share` from 0 to 1; redraws at most ten times a second.
  void show(double share, const std::string& detail);

 private:
  std::string what_;
  bool terminal_;
  bool drawn_ = false;
  std::chrono::steady_clock::time_point next_{};
};

}  // namespace expertwire::tools
