#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/process.hpp"
#include "expertwire/communicator.hpp"

namespace expertwire::inline v0 {

/// Memory of the backend that every rank of a communicator carves at the same time and writes into
/// at its peers.
///
/// Ranks let go of it at different times, and one that still has it may still write to those that
/// do not. So a destructor tells every peer that this rank writes no more, and a rank's own memory
/// is used again only when all its peers have said so.
class SharedBlock {
 public:
  /// Collective. `staged_bytes` of host memory of this rank are for what staged peers write; of
  /// each rank that has one. Throws `Error{capacity}` on every rank if some rank has no room. The
  /// content is unspecified, and no peer writes to it before a barrier that follows.
  SharedBlock(std::shared_ptr<Communicator> communicator, std::size_t bytes,
              std::size_t staged_bytes = 0);
  SharedBlock(const SharedBlock&) = delete;
  SharedBlock& operator=(const SharedBlock&) = delete;
  ~SharedBlock();

  Communicator& communicator() const { return *communicator_; }
  /// Start of the block in the memory of `rank`; 4096-byte aligned. Null if that is staged.
  std::byte* base(int rank) const { return bases_[static_cast<std::size_t>(rank)]; }
  /// `bytes` at `offset` of the host memory of `rank`, mapped by this rank's GPU.
  std::byte* staged(int rank, std::uint64_t offset, std::size_t bytes) const;

 private:
  static constexpr std::uint64_t kNoRoom = UINT64_MAX;
  /// Offsets in a rank's arenas.
  struct Places {
    std::uint64_t farewells;  ///< in host memory: a word a peer, by which it says that it has left
    std::uint64_t data;
    std::uint64_t staged;  ///< in host memory that GPUs map; kNoRoom: none
  };

  void open(int peer, const Places& places);
  std::uint64_t* farewell(const Places& places, int owner, std::size_t writer) const;

  OwnProcess process_;
  std::shared_ptr<Communicator> communicator_;
  Places mine_{kNoRoom, kNoRoom, kNoRoom};
  std::vector<std::byte*> bases_;             // by rank, as the next
  std::vector<std::uint64_t> staged_;         // offsets of staging
  std::vector<std::uint64_t*> my_farewells_;  // at every rank, by rank
};

}  // namespace expertwire
