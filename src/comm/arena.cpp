#include <sys/mman.h>

#include <algorithm>

#include "base/check.hpp"
#include "expertwire/memory.hpp"

namespace expertwire {

namespace {

constexpr std::size_t kPage = 4096;

}  // namespace

Arena::Arena(std::vector<Memory> parts, int rank) : parts_(std::move(parts)), rank_(rank) {}

std::uint64_t Arena::carve(std::size_t bytes) {
  const std::size_t size = std::max(kPage, (bytes + kPage - 1) / kPage * kPage);
  std::lock_guard lock(mutex_);
  std::uint64_t offset = 0;
  for (const auto& [begin, length] : taken_) {
    if (begin - offset >= size) break;
    offset = begin + length;
  }
  check(offset + size <= local().bytes(), ErrorCode::capacity,
        "an object needs {} bytes of the arena, which has {} bytes in one piece left of {}; make "
        "the communicator with a larger arena_bytes, or set EXPERTWIRE_ARENA_BYTES",
        size, local().bytes() - std::min<std::uint64_t>(offset, local().bytes()), local().bytes());
  taken_[offset] = size;
  return offset;
}

void Arena::give_back(std::uint64_t offset) noexcept {
  std::lock_guard lock(mutex_);
  auto it = taken_.find(offset);
  if (it == taken_.end()) return;
  ::madvise(local().data() + offset, it->second, MADV_REMOVE);
  taken_.erase(it);
}

std::size_t Arena::carved() const {
  std::lock_guard lock(mutex_);
  std::size_t total = 0;
  for (const auto& [offset, size] : taken_) total += size;
  return total;
}

}  // namespace expertwire
