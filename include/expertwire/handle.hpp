#pragma once

#include <memory>

namespace expertwire::inline v0 {

namespace ep {
struct HandleState;
struct HandleAccess;
}  // namespace ep

/// The routing of one dispatch, needed to combine its results.
///
/// It owns what it needs: it stays valid after later dispatches and may be combined more than once
/// (rows of a pool in place: once, for combine releases them).
/// Copies share the routing. An object refuses a handle that another object made.
class Handle {
 public:
  Handle() = default;

  bool valid() const noexcept { return state_ != nullptr; }

 private:
  friend struct ep::HandleAccess;
  explicit Handle(std::shared_ptr<ep::HandleState> state);

  std::shared_ptr<ep::HandleState> state_;
  std::shared_ptr<void> held_;  // shared by the copies: gone when no caller can use the handle
};

}  // namespace expertwire
