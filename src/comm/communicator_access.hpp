#pragma once

#include <functional>
#include <memory>
#include <string>

#include "comm/memory_table.hpp"
#include "comm/watcher.hpp"
#include "expertwire/communicator.hpp"

namespace expertwire::inline v0 {

class Proxies;

/// What the layers above need of a communicator and its users do not.
struct CommunicatorAccess {
  static Watcher& watcher(Communicator& communicator);
  /// What all objects of a communicator share: made by the first that asks, kept until the
  /// communicator ends.
  static std::shared_ptr<void> shared_state(Communicator& communicator,
                                            const std::function<std::shared_ptr<void>()>& make);
  /// The memories that it knows by number.
  static const MemoryTable& memories(Communicator& communicator);
  /// Its proxies, which the first who asks starts.
  static Proxies& proxies(Communicator& communicator);
  /// `memory` with the number that its communicator gave it, and what serialize() says of it.
  static Memory numbered(Memory memory, std::uint32_t id, std::string offer);
  /// Lets GPUs of this process use `bytes` at `offset` of this rank's host arena from now on.
  static void map_host(Communicator& communicator, std::uint64_t offset, std::size_t bytes);
  /// Host memory of all ranks, for staged peers.
  static Arena& staging(Communicator& communicator);
  /// `bytes` of it at `offset` of the part of `rank`, which GPUs of this process may use from now
  /// on.
  static std::byte* map_staging(Communicator& communicator, int rank, std::uint64_t offset,
                                std::size_t bytes);
};

}  // namespace expertwire
