#pragma once

#include <functional>
#include <memory>

#include "comm/watcher.hpp"
#include "expertwire/communicator.hpp"

namespace expertwire::inline v0 {

/// What the layers above need of a communicator and its users do not.
struct CommunicatorAccess {
  static Watcher& watcher(Communicator& communicator);
  /// What all objects of a communicator share: made by the first that asks, kept until the
  /// communicator ends.
  static std::shared_ptr<void> shared_state(Communicator& communicator,
                                            const std::function<std::shared_ptr<void>()>& make);
};

}  // namespace expertwire
