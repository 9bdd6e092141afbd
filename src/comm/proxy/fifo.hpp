#pragma once

#include <cstdint>
#include <memory>

#include "expertwire/fifo.hpp"

namespace expertwire::inline v0 {

/// A word of host memory that kernels read; zero. Throws `Error{unsupported}` in builds without
/// CUDA.
std::shared_ptr<std::uint64_t> make_kernel_word();

/// A queue of triggers: any number of producers of one kind, one consumer at a time. The consumer's
/// side is here; kernels push by the view.
class Fifo {
 public:
  static constexpr std::uint64_t kUsualCapacity = 1024;

  /// For CPU threads. `capacity` is a power of two.
  static std::unique_ptr<Fifo> for_threads(std::uint64_t capacity = kUsualCapacity);
  /// For kernels on `device`. Throws `Error{unsupported}` in builds without CUDA.
  static std::unique_ptr<Fifo> for_kernels(int device, std::uint64_t capacity = kUsualCapacity);

  /// `memory` holds what the view points at.
  Fifo(const FifoView& view, std::shared_ptr<void> memory)
      : view_(view), memory_(std::move(memory)) {}

  const FifoView& view() const { return view_; }

  /// Tries once; the position if there was room. Any thread.
  bool try_push(const Trigger& trigger, std::uint64_t* position) {
    if (!claim<HostFifoAccess>(view_, position)) return false;
    commit<HostFifoAccess>(view_, *position, trigger);
    return true;
  }

  /// The next trigger and its position, if it is there. It is taken by pop().
  const Trigger* front() const {
    return committed<HostFifoAccess>(view_, next_) ? view_.slot(next_) : nullptr;
  }
  std::uint64_t position() const { return next_; }
  void pop() { give_back<HostFifoAccess>(view_, ++next_); }

 private:
  FifoView view_;
  std::shared_ptr<void> memory_;
  std::uint64_t next_ = 0;
};

}  // namespace expertwire
