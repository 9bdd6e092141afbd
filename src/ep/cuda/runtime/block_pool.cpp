#include "ep/cuda/runtime/block_pool.hpp"

#include <algorithm>

#include "base/cuda.hpp"
#include "ep/front/object.hpp"
#include "ep/protocol/slots.hpp"

namespace expertwire::inline v0::ep::cuda {

BlockPool::BlockPool(std::shared_ptr<DeviceShare> share, std::size_t bytes)
    : share_(std::move(share)), bytes_(align_up(bytes, 256)) {
  add(kFewest);
}

/// Memory is taken on a stream apart, which a capture allows.
void BlockPool::add(int count) {
  owned_.push_back(allocate_on_device(bytes_ * static_cast<std::size_t>(count), share_->device(),
                                      share_->memory_stream()));
  for (int i = 0; i < count; ++i)
    free_.push_back(static_cast<std::byte*>(owned_.back().get()) +
                    bytes_ * static_cast<std::size_t>(i));
  blocks_ += count;
}

std::shared_ptr<std::byte> BlockPool::take(const StreamPlace& place) {
  std::byte* taken = nullptr;
  {
    std::lock_guard lock(mutex_);
    if (free_.empty()) add(std::max(blocks_, kFewest));
    taken = free_.back();
    free_.pop_back();
  }
  std::shared_ptr<std::byte> block(taken, [pool = shared_from_this()](std::byte* p) {
    std::lock_guard back(pool->mutex_);
    pool->free_.push_back(p);
  });
  if (place.captured()) keep_with_graph(place, block);
  return block;
}

std::shared_ptr<std::byte> BlockPool::take(const StreamPlace& place, const Allocator& given) {
  if (!given) return take(place);
  OutputMaker maker(given);
  const TensorView memory = maker.make("handle", DType::uint8, {static_cast<std::int64_t>(bytes_)});
  return {maker.owner(), memory.as<std::byte>()};
}

}  // namespace expertwire::ep::cuda
