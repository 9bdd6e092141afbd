#pragma once

// Rows that are grouped by expert, in kernels: one comes for a token, and has a copy for each of
// its selections here; on the way home the copies' rows are added before one goes. A lane of a warp
// keeps each selection.

#include "ep/cuda/high_throughput/block.cuh"

namespace expertwire::inline v0::ep::cuda {

/// How the rows of an operation are arranged; kernels are compiled for each.
struct TokenMajorRows {
  static constexpr bool kGrouped = false;
};
struct GroupedRows {
  static constexpr bool kGrouped = true;
};

template <class Visit>
auto with_layout(bool grouped, Visit visit) {
  return grouped ? visit(GroupedRows{}) : visit(TokenMajorRows{});
}

/// Calls `prepare` with each layout until one returns an error.
template <class Prepare>
cudaError_t for_each_layout(Prepare prepare) {
  const cudaError_t result = prepare(TokenMajorRows{});
  return result == cudaSuccess ? prepare(GroupedRows{}) : result;
}

/// The row of a selection in an output of `rows` rows, or -1 if it has no room.
__device__ __forceinline__ std::int32_t place_in_group(const HighThroughputRouting& routing,
                                                       const Placement& placement, int rows,
                                                       int source, std::int32_t local_expert,
                                                       std::int32_t position) {
  const std::int32_t first = routing.first_in[source * placement.local_experts() + local_expert];
  const Run run = Grouped{rows}.run(first);
  const auto i = static_cast<std::uint32_t>(position);
  return run.has_room(i) ? static_cast<std::int32_t>(run.place(i)) : -1;
}

/// Where the handle keeps the places of a token that came, the i-th of a source: [K].
__device__ __forceinline__ std::int32_t* places_of(const HighThroughputRouting& routing, int top_k,
                                                   int source, int i) {
  return routing.places + (static_cast<std::int64_t>(routing.first_from[source]) + i) * top_k;
}

/// Which of `set`'s lanes is its `i`-th, counted from 0; it has so many.
__device__ __forceinline__ int lane_of(unsigned set, int i) {
#pragma unroll 1
  for (; i > 0; --i) set &= set - 1;
  return __ffs(static_cast<int>(set)) - 1;
}

/// A token's copies at the experts of one rank, on the lanes of a warp.
struct Copies {
  std::int32_t place = -1;  ///< of this lane's selection, -1: none
  float weight = 1;

  __device__ __forceinline__ unsigned lanes() const { return __ballot_sync(kAllLanes, place >= 0); }
};

/// Rows of an output that nothing came for: those that pad groups are zeros, and none of them, nor
/// of the rest of a capacity, is a token's. All warps of the grid share them out.
template <class Layout>
__device__ __noinline__ void pad_output(const HighThroughputDispatchParams& p,
                                        const BlockShared& s) {
  const int lane = static_cast<int>(threadIdx.x) % 32, blocks = workers(p.context);
  const int warp = static_cast<int>(threadIdx.x) / 32 * blocks + static_cast<int>(blockIdx.x);
  const int warps = kHighThroughputWarps * blocks;
  const int top_k = Layout::kGrouped ? 1 : p.shape.top_k;
  const auto vectors = static_cast<int>(p.format.data_bytes / sizeof(uint4));
  auto blank = [&](std::int64_t row, bool zeros) {
    if (lane == 0) p.out_tokens[row] = -1;
    for (int k = lane; k < top_k; k += 32) {
      p.out_experts[row * top_k + k] = -1;
      p.out_weights[row * top_k + k] = 0;
    }
    for (int i = lane; i < static_cast<int>(p.format.scales); i += 32)
      p.out_scales[row * p.format.scales + i] = 0;
    if (!zeros) return;
    auto* x = reinterpret_cast<uint4*>(p.out_x + row * p.format.data_bytes);
    for (int v = lane; v < vectors; v += 32) x[v] = uint4{};
  };
  if constexpr (Layout::kGrouped) {
    const int groups = p.shape.placement.local_experts();
    const int step = max(warps / groups, 1);  // warps of a group
    for (int e = warp / step; e < groups; e += max(warps / step, 1)) {
      const HighThroughputRouting& r = p.routing;
      const int begin = r.group_offsets[e] + r.expert_offsets[e + 1] - r.expert_offsets[e];
      const int end = min(r.group_offsets[e + 1], p.out_rows);
      for (int row = begin + warp % step; row < end; row += step) blank(row, true);
    }
  }
  for (int row = s.needed + warp; row < p.out_rows; row += warps) blank(row, false);
}

}  // namespace expertwire::ep::cuda
