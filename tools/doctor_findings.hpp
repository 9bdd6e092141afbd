#pragma once

#include <fmt/format.h>

#include <string>
#include <utility>

namespace expertwire::tools {

/// What the doctor says: facts, and what is wrong with what to do about it.
class Findings {
 public:
  void section(const char* title) { fmt::print("\n{}\n", title); }
  template <class... Args>
  void fact(const char* name, fmt::format_string<Args...> text, Args&&... args) {
    fmt::print("  {:<22} {}\n", name, fmt::format(text, std::forward<Args>(args)...));
  }
  /// `advice` is what to do.
  void problem(const std::string& what, const std::string& advice) {
    fmt::print("  WRONG                  {}\n                         -> {}\n", what, advice);
    ++problems_;
  }
  /// Works, but could be better.
  void note(const std::string& what, const std::string& advice) {
    fmt::print("  note                   {}\n                         -> {}\n", what, advice);
  }
  int problems() const { return problems_; }

 private:
  int problems_ = 0;
};

/// Interfaces, RDMA devices, UCX, proxies, and what wires reach.
void examine_network(Findings& findings, bool measure);

/// GPUs, links, handle types, limits; says so where the build has no CUDA.
void examine_gpus(Findings& findings, bool measure);

}  // namespace expertwire::tools
