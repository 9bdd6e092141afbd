#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string_view>
#include <vector>

#include "expertwire/dtype.hpp"

namespace expertwire {

/// What an operation asks an allocator for.
struct AllocationRequest {
  std::string_view name;            ///< which output, e.g. "x"
  DType dtype;                      ///< element type
  std::vector<std::int64_t> shape;  ///< row-major, contiguous
  std::size_t bytes;                ///< product of the above; may be 0
};

/// Memory that an allocator gave, and what keeps it alive.
struct Allocation {
  void* data = nullptr;         ///< 16-byte aligned; may be null if `bytes` was 0
  std::shared_ptr<void> owner;  ///< held by the result of the operation; may be empty
};

/// Gives memory for outputs that the caller did not provide. Called on the calling thread, before
/// the operation sends rows. On the CUDA backend it gives memory of the communicator's device.
/// Without one, outputs are owned by the result: 64-byte aligned host memory, on CUDA device
/// memory.
using Allocator = std::function<Allocation(const AllocationRequest&)>;

/// The allocator that the CPU backend uses when a request names none.
Allocation allocate_host(const AllocationRequest& request);

}  // namespace expertwire
