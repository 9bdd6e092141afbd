#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <string_view>
#include <vector>

#include "ep/cuda/runtime/device_share.hpp"
#include "expertwire/allocator.hpp"

namespace expertwire::inline v0::ep::cuda {

/// Blocks of device memory for the routing of handles, of the usual size and of twice that, four
/// times, and so on; used again in the order of their lane. A block that a capture uses is the
/// graph's as long as that exists.
class BlockPool : public std::enable_shared_from_this<BlockPool> {
 public:
  BlockPool(std::shared_ptr<DeviceShare> share, std::size_t usual);
  /// A block for work on `place`: from the caller's allocator, who then says how long it lasts, by
  /// that name; or of the pool, which grows as it must.
  std::shared_ptr<std::byte> take(const StreamPlace& place, std::size_t bytes,
                                  const Allocator& given, std::string_view name = "handle");
  /// One of the usual size.
  std::shared_ptr<std::byte> take(const StreamPlace& place, const Allocator& given) {
    return take(place, usual_, given);
  }

 private:
  static constexpr int kFewest = 8;

  /// Blocks of one size.
  struct Size {
    std::vector<std::byte*> free;
    int blocks = 0;
  };

  std::shared_ptr<std::byte> take(const StreamPlace& place, std::size_t bytes);
  void add(std::size_t bytes, int count);

  std::shared_ptr<DeviceShare> share_;
  std::size_t usual_;
  std::mutex mutex_;
  std::vector<std::shared_ptr<void>> owned_;
  std::map<std::size_t, Size> sizes_;
};

}  // namespace expertwire::ep::cuda
