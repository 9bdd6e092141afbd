#pragma once

// Layouts: where the copies of rows lie in an output. Dispatch writes there and combine reads
// there; what an output has no room for is left out here alone. Shared by host and device.
//
// Rows of one source lie side by side, a run of them for each group of an output. A layout says
// which groups there are and where a run begins; a row is the i-th of its run.

#include <cstdint>

#include "expertwire/host_device.hpp"

namespace expertwire::inline v0::ep {

/// Rows of one source, side by side in one group of an output.
struct Run {
  std::uint32_t first;  ///< place of its first row
  std::uint32_t end;    ///< of the group: rows from there on have no place

  EXPERTWIRE_HOST_DEVICE constexpr bool has_room(std::uint32_t i) const { return first + i < end; }
  /// Of the i-th row, which has room.
  EXPERTWIRE_HOST_DEVICE constexpr std::uint32_t place(std::uint32_t i) const { return first + i; }
  /// How many of its first `count` rows have room.
  EXPERTWIRE_HOST_DEVICE constexpr std::uint32_t fitting(std::uint32_t count) const {
    const std::uint32_t room = first < end ? end - first : 0;
    return count < room ? count : room;
  }
};

/// One row per (token, rank): all in one group, by source, then token.
struct TokenMajor {
  std::int64_t capacity;  ///< rows of the output

  /// The run of a source before which `first` rows come.
  EXPERTWIRE_HOST_DEVICE constexpr Run run(std::int64_t first) const {
    return {static_cast<std::uint32_t>(first), static_cast<std::uint32_t>(capacity)};
  }
};

/// One row per selection: a group for every local expert, groups of the sizes that they need side
/// by side; in a group by source, then token.
struct Grouped {
  std::int64_t capacity;  ///< rows of the output

  /// The run of a source in a group, before which `first` rows of the output come.
  EXPERTWIRE_HOST_DEVICE constexpr Run run(std::int64_t first) const {
    return TokenMajor{capacity}.run(first);
  }
};

/// One row per selection: a group of the same size for every local expert, in it by source, then
/// token.
struct ExpertMajor {
  std::int64_t room;  ///< rows of a group

  /// The run of a source before which `first` rows come in the group of `local_expert`.
  EXPERTWIRE_HOST_DEVICE constexpr Run run(int local_expert, std::int64_t first) const {
    const std::int64_t group = local_expert * room;
    return {static_cast<std::uint32_t>(group + first), static_cast<std::uint32_t>(group + room)};
  }
};

}  // namespace expertwire::ep
