#pragma once

namespace expertwire {

/// How the kernels of the CUDA backend are cut to shape and machine. What is 0 follows from the
/// shape, the SM budget and the links (ep/cuda/tuning.hpp has the formulas), or from the variable
/// of the environment that is named. Results do not depend on any of it; ranks may differ.
struct Tuning {
  /// High-throughput dispatch: warps of a block that send rows, 1 to 15 (the others, of 16,
  /// receive), `EXPERTWIRE_SENDER_WARPS`.
  int sender_warps = 0;
  /// High throughput, with bulk copies: stages of a warp's ring in shared memory, 2 to 4,
  /// `EXPERTWIRE_STAGES`.
  int stages = 0;
};

}  // namespace expertwire
