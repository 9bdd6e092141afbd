#include "ep/cuda/runtime/block_pool.hpp"

#include <algorithm>

#include "base/cuda.hpp"
#include "ep/front/object.hpp"
#include "ep/protocol/slots.hpp"

namespace expertwire::inline v0::ep::cuda {

BlockPool::BlockPool(std::shared_ptr<DeviceShare> share, std::size_t usual)
    : share_(std::move(share)), usual_(align_up(usual, 256)) {
  add(usual_, kFewest);
}

/// Memory is taken on a stream apart, which a capture allows.
void BlockPool::add(std::size_t bytes, int count) {
  owned_.push_back(allocate_on_device(bytes * static_cast<std::size_t>(count), share_->device(),
                                      share_->memory_stream()));
  Size& size = sizes_[bytes];
  for (int i = 0; i < count; ++i)
    size.free.push_back(static_cast<std::byte*>(owned_.back().get()) +
                        bytes * static_cast<std::size_t>(i));
  size.blocks += count;
}

std::shared_ptr<std::byte> BlockPool::take(const StreamPlace& place, std::size_t bytes) {
  std::size_t most = usual_;
  while (most < bytes) most *= 2;
  std::byte* taken = nullptr;
  {
    std::lock_guard lock(mutex_);
    Size& size = sizes_[most];
    if (size.free.empty()) add(most, most == usual_ ? std::max(size.blocks, kFewest) : 2);
    taken = size.free.back();
    size.free.pop_back();
  }
  std::shared_ptr<std::byte> block(taken, [pool = shared_from_this(), most](std::byte* p) {
    std::lock_guard back(pool->mutex_);
    pool->sizes_[most].free.push_back(p);
  });
  if (place.captured()) keep_with_graph(place, block);
  return block;
}

std::shared_ptr<std::byte> BlockPool::take(const StreamPlace& place, std::size_t bytes,
                                           const Allocator& given, std::string_view name) {
  if (!given) return take(place, bytes);
  OutputMaker maker(given);
  const TensorView memory = maker.make(name, DType::uint8, {static_cast<std::int64_t>(bytes)});
  return {maker.owner(), memory.as<std::byte>()};
}

}  // namespace expertwire::ep::cuda
