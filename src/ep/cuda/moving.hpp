#pragma once

#include <cstdint>

namespace expertwire::ep::cuda {

/// How warps move rows; see pipeline.cuh.
struct Moving {
  std::uint32_t piece_bytes;  ///< of a row
  std::int32_t stages;
  std::int32_t warps;  ///< of a block that have a ring
  bool bulk;
  /// Somebody waits for rows as they come: warps take few at a time, and count them at once. Else a
  /// warp counts when it leaves a chunk.
  bool awaited;
};

struct MovingRequest {
  std::uint64_t row_bytes;
  std::uint32_t ring_bytes;  ///< of shared memory, for all warps
  int warps, stages, parts;
  bool bulk;
  bool awaited;
};

/// Splits rows so that `warps` warps have `stages` stages of `parts` pieces each. Without bulk
/// copies there are no rings, and a piece is a row.
inline Moving plan_moving(const MovingRequest& r) {
  Moving moving{static_cast<std::uint32_t>(r.row_bytes), r.stages, r.warps, r.bulk, r.awaited};
  if (!r.bulk) return moving;
  constexpr std::uint64_t kVector = 16;
  const std::uint64_t most =
      r.ring_bytes / static_cast<std::uint64_t>(r.warps * r.stages * r.parts) / kVector * kVector;
  const std::uint64_t pieces = (r.row_bytes + most - 1) / most;
  const std::uint64_t piece = (r.row_bytes + pieces - 1) / pieces;
  moving.piece_bytes = static_cast<std::uint32_t>((piece + kVector - 1) / kVector * kVector);
  return moving;
}

}  // namespace expertwire::ep::cuda
