#pragma once

namespace expertwire::inline v0 {

/// How the high-throughput dispatch of the CUDA backend is cut to the machine. What is 0 comes from
/// the environment variable that is named, else by formula (src/ep/cuda/kernel/tuning.hpp) from the
/// SM budget and the speed of the links, which is measured when a high-throughput object with 8 MB
/// of pool or more is made, once a communicator. Results do not depend on it, and ranks may differ.
struct Tuning {
  /// Warps of a block, of 16, that send rows; 1 to 15. `EXPERTWIRE_SENDER_WARPS`.
  int sender_warps = 0;
  /// What of a block's shared memory holds rows on their way; 16384 to 229376 bytes. A block has
  /// all of it in any case. `EXPERTWIRE_RING_BYTES`.
  int ring_bytes = 0;
};

}  // namespace expertwire
