#pragma once

#include <cstddef>
#include <memory>
#include <string_view>
#include <type_traits>

#include "expertwire/tensor.hpp"

namespace expertwire::inline v0 {

/// What an operation asks an allocator for.
struct AllocationRequest {
  std::string_view name;  ///< which output, e.g. "x"
  /// Its dtype and shape, row-major and contiguous; bytes() may be 0. It has no data.
  const TensorView& like;
};

/// Memory that an allocator gave, and what keeps it alive.
struct Allocation {
  void* data = nullptr;         ///< 16-byte aligned; may be null if nothing was asked for
  std::shared_ptr<void> owner;  ///< held by the result of the operation; may be empty
};

/// Gives memory for outputs that the caller did not provide: a function and what it is called with,
/// which must outlive the call that it is given to. Called on the calling thread, before the
/// operation sends rows. On the CUDA backend it gives memory of the communicator's device. Without
/// one, outputs are owned by the result: 64-byte aligned host memory, on CUDA device memory.
struct Allocator {
  Allocation (*give)(void* self, const AllocationRequest& request) = nullptr;
  void* self = nullptr;

  /// Calls `function`, which is anything that takes an AllocationRequest.
  template <class Function>
  static Allocator of(Function& function) {
    return {[](void* to, const AllocationRequest& request) -> Allocation {
              return (*static_cast<Function*>(to))(request);
            },
            const_cast<std::remove_const_t<Function>*>(&function)};
  }
  explicit operator bool() const noexcept { return give != nullptr; }
  Allocation operator()(const AllocationRequest& request) const { return give(self, request); }
};

/// 64-byte aligned host memory of so many bytes; null for none.
Allocation allocate_host(std::size_t bytes);

}  // namespace expertwire
