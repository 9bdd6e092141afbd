#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace expertwire::inline v0 {

/// One burst in the pattern of a dispatch, with no protocol: every block writes its share of
/// `bytes_per_peer` to each of `peers` in turn, by 16-byte stores or (Hopper and later) by bulk
/// copies out of shared memory. What a wire of load and store can do at most with these SMs.
struct StoreAllParams {
  static constexpr int kMostPeers = 64;
  void* peers[kMostPeers];
  const void* source;
  std::size_t bytes_per_peer;
  int count;  ///< of peers
};
cudaError_t launch_store_all(const StoreAllParams& params, int blocks, cudaStream_t stream);
cudaError_t launch_bulk_store_all(const StoreAllParams& params, int blocks, cudaStream_t stream);

}  // namespace expertwire
