#include "comm/memory_table.hpp"

#include "base/check.hpp"

namespace expertwire::inline v0 {

MemoryTable::~MemoryTable() {
  for (auto& page : pages_) delete page.load();
}

MemoryTable::Slot* MemoryTable::slot(std::uint32_t id) const noexcept {
  if (id >= kMost) return nullptr;
  Page* page = pages_[id / kPerPage].load(std::memory_order_acquire);
  return page == nullptr ? nullptr : &page->slots[id % kPerPage];
}

std::uint32_t MemoryTable::reserve() {
  std::lock_guard lock(mutex_);
  check(next_ < kMost, ErrorCode::capacity,
        "a communicator knows at most {} memories in its life; register larger ones", kMost);
  auto& page = pages_[next_ / kPerPage];
  if (page.load(std::memory_order_relaxed) == nullptr)
    page.store(std::make_unique<Page>().release(), std::memory_order_release);
  return next_++;
}

void MemoryTable::set(std::uint32_t id, const Memory& memory, std::uint32_t remote_id,
                      std::string key, std::uint64_t address) {
  Slot* const place = slot(id);
  place->entry = {memory.rank(), memory.kind(),  memory.data(), memory.bytes(),
                  remote_id,     std::move(key), address};
  place->owner = memory.shared();
  place->present.store(true, std::memory_order_release);
}

const MemoryTable::Entry* MemoryTable::find(std::uint32_t id) const noexcept {
  const Slot* const place = slot(id);
  if (place == nullptr || !place->present.load(std::memory_order_acquire)) return nullptr;
  return &place->entry;
}

bool MemoryTable::remove(std::uint32_t id) {
  // The entry itself stays: a proxy may be looking at it.
  Slot* const place = slot(id);
  if (place == nullptr || !place->present.exchange(false, std::memory_order_acq_rel)) return false;
  place->owner.reset();
  return true;
}

}  // namespace expertwire
