#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "comm/socket.hpp"

namespace expertwire::inline v0 {

/// A sparse block of shared memory without a name, mapped here.
struct Segment {
  std::uint64_t id = 0;  ///< finds it again within this process
  Fd fd;                 ///< to pass to other processes
  std::size_t bytes = 0;
  std::shared_ptr<std::byte> mapping;
};

/// Creates a segment (memfd). Throws `Error{system}` with what to set when memory is refused.
Segment create_segment(std::size_t bytes);
/// Lets ranks of this process find a mapping of another kind of memory by an id.
std::uint64_t register_mapping(const std::shared_ptr<std::byte>& mapping);
/// The mapping of a segment that a rank of this same process created; null if it is gone.
std::shared_ptr<std::byte> find_segment(std::uint64_t id);
/// Says that the rank which created the segment has left; its mapping lives on where it is used.
void retire_segment(std::uint64_t id);
bool segment_retired(std::uint64_t id);
/// From now on, as long as it exists, this eventfd is written to whenever a segment is retired.
void notify_of_retirements(const std::shared_ptr<Fd>& event);
/// Maps a segment that another process created.
std::shared_ptr<std::byte> map_segment(const Fd& fd, std::size_t bytes);

}  // namespace expertwire
