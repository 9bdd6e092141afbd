#pragma once

#include <memory>

namespace expertwire {

namespace ep {
struct HandleState;
}

/// The routing of one dispatch, needed to combine its results.
///
/// It owns what it needs: it stays valid after later dispatches and may be combined more than once
/// (rows of a pool in place: once, for combine releases them).
/// Copies share the routing. An object refuses a handle that another object made.
class Handle {
 public:
  Handle() = default;
  explicit Handle(std::shared_ptr<ep::HandleState> state);

  bool valid() const noexcept { return state_ != nullptr; }
  const std::shared_ptr<ep::HandleState>& state() const noexcept { return state_; }

 private:
  std::shared_ptr<ep::HandleState> state_;
  std::shared_ptr<void> held_;  // shared by the copies: gone when no caller can use the handle
};

}  // namespace expertwire
