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
  std::lock_guard lock(mutex_);
  release_safe();
  const std::size_t whole = local().bytes();
  const std::size_t size =
      bytes > whole ? bytes : std::max(kPage, (bytes + kPage - 1) / kPage * kPage);
  std::uint64_t offset = 0;
  std::uint64_t largest = 0;
  bool found = false;
  for (const auto& [begin, length] : taken_) {
    largest = std::max(largest, begin - offset);
    found = begin - offset >= size;
    if (found) break;
    offset = begin + length;
  }
  if (!found) largest = std::max<std::uint64_t>(largest, whole - offset);
  check(found || size <= whole - offset, ErrorCode::capacity,
        "an object needs {} bytes of the arena, which has {} bytes in one piece left of {}; make "
        "the communicator with a larger arena_bytes, or set EXPERTWIRE_ARENA_BYTES",
        bytes, largest, whole);
  taken_[offset] = size;
  return offset;
}

void Arena::give_back(std::uint64_t offset) noexcept {
  std::lock_guard lock(mutex_);
  release(offset);
}

void Arena::give_back_when(std::uint64_t offset, std::function<bool()> safe) {
  std::lock_guard lock(mutex_);
  leaving_[offset] = std::move(safe);
  release_safe();
}

std::size_t Arena::carved() {
  std::lock_guard lock(mutex_);
  release_safe();
  std::size_t total = 0;
  for (const auto& [offset, size] : taken_) total += size;
  return total;
}

void Arena::release_safe() {
  for (auto it = leaving_.begin(); it != leaving_.end();) {
    const bool safe = it->second();
    if (safe) release(it->first);
    it = safe ? leaving_.erase(it) : std::next(it);
  }
}

void Arena::release(std::uint64_t offset) {
  auto it = taken_.find(offset);
  if (it == taken_.end()) return;
  if (local().kind() == MemoryKind::host)
    ::madvise(local().data() + offset, it->second, MADV_REMOVE);
  taken_.erase(it);
}

}  // namespace expertwire
