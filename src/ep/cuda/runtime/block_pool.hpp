#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "ep/cuda/runtime/device_share.hpp"
#include "expertwire/allocator.hpp"

namespace expertwire::inline v0::ep::cuda {

/// Blocks of device memory of one size, for the routing of handles; used again in the order of
/// their lane. A block that a capture uses is the graph's as long as that exists.
class BlockPool : public std::enable_shared_from_this<BlockPool> {
 public:
  BlockPool(std::shared_ptr<DeviceShare> share, std::size_t bytes);
  /// A block for work on `place`: from the caller's allocator, who then says how long it lasts, or
  /// of the pool, which grows as it must.
  std::shared_ptr<std::byte> take(const StreamPlace& place, const Allocator& given);
  std::size_t bytes() const { return bytes_; }

 private:
  static constexpr int kFewest = 8;

  std::shared_ptr<std::byte> take(const StreamPlace& place);
  void add(int count);

  std::shared_ptr<DeviceShare> share_;
  std::size_t bytes_;
  std::mutex mutex_;
  std::vector<std::shared_ptr<void>> owned_;
  std::vector<std::byte*> free_;
  int blocks_ = 0;
};

}  // namespace expertwire::ep::cuda
