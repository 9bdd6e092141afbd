#pragma once

#include <unistd.h>

namespace expertwire::inline v0 {

/// The process that made something. A forked child gets a copy of it without the threads that serve
/// it, and must neither use it nor take leave in its parent's name.
class OwnProcess {
 public:
  bool here() const noexcept { return ::getpid() == pid_; }
  int pid() const noexcept { return pid_; }

 private:
  pid_t pid_ = ::getpid();
};

}  // namespace expertwire
