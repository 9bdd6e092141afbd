#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "expertwire/communicator.hpp"

namespace expertwire {

/// Memory that every rank of a communicator carves at the same time and writes into at its peers.
///
/// Ranks let go of it at different times, and one that still has it may still write to those that
/// do not. So a destructor tells every peer that this rank writes no more, and a rank's own memory
/// is used again only when all its peers have said so.
class SharedBlock {
 public:
  /// Collective. Throws `Error{capacity}` on every rank if some rank has no room, and
  /// `Error{unsupported}` if a peer's memory is not mapped here. The content is unspecified, and no
  /// peer writes to it before a barrier that follows.
  SharedBlock(std::shared_ptr<Communicator> communicator, std::size_t bytes);
  SharedBlock(const SharedBlock&) = delete;
  SharedBlock& operator=(const SharedBlock&) = delete;
  ~SharedBlock();

  Communicator& communicator() const { return *communicator_; }
  /// Start of the block in the memory of `rank`; 128-byte aligned.
  std::byte* base(int rank) const { return bases_[static_cast<std::size_t>(rank)]; }

 private:
  std::uint64_t* farewell(int owner, int writer) const;

  std::shared_ptr<Communicator> communicator_;
  std::uint64_t offset_ = 0;
  std::vector<std::byte*> bases_;  // by rank
};

}  // namespace expertwire
