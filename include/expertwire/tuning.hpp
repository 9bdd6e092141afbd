#pragma once

namespace expertwire {

/// How the high-throughput dispatch of the CUDA backend is cut to shape and machine. What is 0
/// comes from the environment variable that is named, else by formula from the shape, the SM budget
/// and the speed of the links, which is measured when the first object of a communicator is made
/// (src/ep/cuda/tuning.hpp). Results do not depend on it, and ranks may differ.
struct Tuning {
  /// Warps of a block, of 16, that send rows; 1 to 15. `EXPERTWIRE_SENDER_WARPS`.
  int sender_warps = 0;
  /// Shared memory of a block for rows on their way; 16384 to 229376. `EXPERTWIRE_RING_BYTES`.
  int ring_bytes = 0;
};

}  // namespace expertwire
