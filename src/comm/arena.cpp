#include <sys/mman.h>

#include <algorithm>
#include <thread>

#include "base/check.hpp"
#include "expertwire/memory.hpp"

namespace expertwire::inline v0 {

namespace {

constexpr std::size_t kPage = 4096;

std::size_t pages_of(std::size_t bytes) {
  return std::max(kPage, (bytes + kPage - 1) / kPage * kPage);
}

}  // namespace

Arena::Arena(std::vector<Memory> parts, int rank, Pages pages)
    : parts_(std::move(parts)), rank_(rank), pages_(pages) {}

std::uint64_t Arena::carve(std::size_t bytes, const Deadline& patience) {
  const std::size_t whole = local().bytes();
  for (;;) {
    {
      std::lock_guard lock(mutex_);
      release_safe();
      const Gap gap = find_gap(bytes, taken_);
      if (gap.fits) {
        taken_[gap.offset] = pages_of(bytes);
        return gap.offset;
      }
      auto later = taken_;
      for (const auto& [offset, safe] : leaving_) later.erase(offset);
      const bool would_fit = find_gap(bytes, later).fits;
      check(would_fit && !patience.expired(), ErrorCode::capacity,
            "an object needs {} bytes of the arena, which has {} bytes in one piece left of {}{}; "
            "make the communicator with a larger arena_bytes, or set EXPERTWIRE_ARENA_BYTES",
            bytes, gap.largest, whole,
            would_fit ? " (other ranks have not destroyed all objects of before)" : "");
    }
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
}

/// The first gap that has room, or the largest that there is.
Arena::Gap Arena::find_gap(std::size_t bytes, const Pieces& taken) const {
  const std::size_t whole = local().bytes();
  const std::size_t size = bytes > whole ? bytes : pages_of(bytes);  // which could overflow
  Gap gap;
  for (const auto& [begin, length] : taken) {
    gap.largest = std::max(gap.largest, begin - gap.offset);
    gap.fits = begin - gap.offset >= size;
    if (gap.fits) return gap;
    gap.offset = begin + length;
  }
  gap.largest = std::max<std::uint64_t>(gap.largest, whole - gap.offset);
  gap.fits = size <= whole - gap.offset;
  return gap;
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
  if (local().kind() == MemoryKind::host && pages_ == Pages::given_back)
    ::madvise(local().data() + offset, it->second, MADV_REMOVE);
  taken_.erase(it);
}

}  // namespace expertwire
