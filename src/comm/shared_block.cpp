#include "comm/shared_block.hpp"

#include <algorithm>
#include <atomic>
#include <optional>

#include "base/check.hpp"

namespace expertwire::inline v0 {

SharedBlock::SharedBlock(std::shared_ptr<Communicator> communicator, std::size_t bytes)
    : communicator_(std::move(communicator)) {
  const auto size = static_cast<std::size_t>(communicator_->size());
  const auto rank = static_cast<std::size_t>(communicator_->rank());
  std::vector<Places> all(size, Places{kNoRoom, kNoRoom});
  std::optional<Error> refused;
  try {
    // An object of before may still be in use at a rank that is slower to destroy it. If that rank
    // keeps it, it waits below for what is found here.
    constexpr std::chrono::milliseconds kMost{2000};
    const Deadline patience = Deadline::after(std::min(communicator_->timeout() / 4, kMost));
    mine_.farewells = communicator_->host_arena().carve(size * sizeof(std::uint64_t), patience);
    mine_.data = communicator_->arena().carve(bytes, patience);
    all[rank] = mine_;
    for (std::size_t peer = 0; peer < size; ++peer)
      *farewell(mine_, communicator_->rank(), peer) = 0;
  } catch (const Error& error) {
    refused = error;
  }
  try {
    communicator_->all_gather(all.data(), sizeof(Places));
    if (refused) throw *refused;
    for (std::size_t peer = 0; peer < size; ++peer) open(static_cast<int>(peer), all[peer]);
  } catch (...) {
    if (mine_.farewells != kNoRoom) communicator_->host_arena().give_back(mine_.farewells);
    if (mine_.data != kNoRoom) communicator_->arena().give_back(mine_.data);
    throw;
  }
}

void SharedBlock::open(int peer, const Places& places) {
  if (places.data == kNoRoom)
    throw Error(ErrorCode::capacity,
                fmt::format("the arena of rank {} has no room for this object", peer),
                {communicator_->rank(), peer, Phase::setup});
  std::byte* part = communicator_->arena().part(peer).data();
  check(part != nullptr, ErrorCode::unsupported, "the memory of rank {} is not mapped here", peer);
  bases_.push_back(part + places.data);
  const auto rank = static_cast<std::size_t>(communicator_->rank());
  my_farewells_.push_back(farewell(places, peer, rank));
}

std::uint64_t* SharedBlock::farewell(const Places& places, int owner, std::size_t writer) const {
  std::byte* part = communicator_->host_arena().part(owner).data();
  return reinterpret_cast<std::uint64_t*>(part + places.farewells) + writer;
}

SharedBlock::~SharedBlock() {
  if (!process_.here()) return;  // the parent still writes
  for (std::uint64_t* word : my_farewells_)
    std::atomic_ref(*word).store(1, std::memory_order_release);
  // The words are given back, too; whoever sees first that all have left remembers it for both.
  const std::uint64_t* first = farewell(mine_, communicator_->rank(), 0);
  auto all_left = [first, size = communicator_->size(),
                   known = std::make_shared<std::atomic<bool>>(false)] {
    if (known->load()) return true;
    for (int peer = 0; peer < size; ++peer) {
      auto& word = *const_cast<std::uint64_t*>(first + peer);
      if (std::atomic_ref(word).load(std::memory_order_acquire) == 0) return false;
    }
    known->store(true);
    return true;
  };
  communicator_->arena().give_back_when(mine_.data, all_left);
  communicator_->host_arena().give_back_when(mine_.farewells, all_left);
}

}  // namespace expertwire
