#include "comm/proxy/channel_table.hpp"

#include <algorithm>

#include "base/check.hpp"

namespace expertwire::inline v0 {

ChannelTable::~ChannelTable() {
  for (std::uint32_t id = 0; id < next_; ++id) delete slots_[id].load();
}

ChannelState& ChannelTable::make(int peer) {
  std::lock_guard lock(mutex_);
  collect();
  check(!free_.empty() || next_ < kMost, ErrorCode::capacity,
        "a communicator has at most {} channels at a time; close some", kMost);
  auto state = std::make_unique<ChannelState>();
  state->peer = peer;
  if (free_.empty()) {
    state->id = next_++;
  } else {
    state->id = free_.back();
    free_.pop_back();
  }
  ChannelState* const made = state.release();
  slots_[made->id].store(made, std::memory_order_release);
  return *made;
}

void ChannelTable::forget(ChannelState& state) {
  std::lock_guard lock(mutex_);
  leaving_.push_back(&state);
  collect();
}

std::size_t ChannelTable::count() {
  std::lock_guard lock(mutex_);
  collect();
  return next_ - free_.size();
}

void ChannelTable::collect() {
  std::erase_if(leaving_, [this](ChannelState* state) {
    if (!state->left.load(std::memory_order_acquire)) return false;
    slots_[state->id].store(nullptr, std::memory_order_release);
    free_.push_back(state->id);
    delete state;
    return true;
  });
}

}  // namespace expertwire
