#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "expertwire/memory.hpp"

namespace expertwire::inline v0 {

/// What an owner says of memory that it has registered; travels as bytes.
struct MemoryOffer {
  static constexpr std::uint64_t kNowhere = UINT64_MAX;

  std::uint64_t magic;
  std::uint64_t job;           ///< number of the job: offers of another one are refused
  std::uint64_t address;       ///< in the process of the owner
  std::uint64_t bytes;         ///< of the memory
  std::uint64_t arena_offset;  ///< where it lies in the owner's arena of that kind, or kNowhere
  std::uint32_t id;            ///< number that the owner knows it by
  std::int32_t rank;
  MemoryKind kind;
  std::array<unsigned char, 3> reserved;
  std::int32_t device;                   ///< the owner's ordinal; -1: host memory
  std::array<unsigned char, 64> handle;  ///< cudaIpc, of the allocation; zeros: none
  std::uint64_t handle_offset;           ///< of the memory in that allocation
  std::uint64_t allocation;              ///< number of that allocation in the owner's process
  std::uint64_t key_bytes;               ///< of what a network needs for remote writes; they follow

  bool in_arena() const { return arena_offset != kNowhere; }
};

/// Throws `Error{invalid_argument}` if `text` is no offer of this job by one of `ranks` ranks.
MemoryOffer parse_offer(std::string_view text, std::uint64_t job, int ranks);
/// An offer with the key that follows it, as bytes.
std::string format_offer(MemoryOffer offer, std::string_view key = {});
/// The key of an offer that parse_offer() has taken.
std::string_view key_of(std::string_view text);

/// Memory at `address` that somebody else owns.
std::shared_ptr<std::byte> not_owned(std::uint64_t address);
/// The memory that the offer speaks of, as a part of the owner's arena. Throws
/// `Error{invalid_argument}` if it does not lie in it.
Memory part_of_arena(const MemoryOffer& offer, const Memory& arena);

}  // namespace expertwire
