#include "comm/shared_block.hpp"

#include <algorithm>
#include <atomic>
#include <optional>

#include "base/check.hpp"
#include "comm/communicator_access.hpp"

namespace expertwire::inline v0 {

SharedBlock::SharedBlock(std::shared_ptr<Communicator> communicator, std::size_t bytes,
                         std::size_t staged_bytes)
    : communicator_(std::move(communicator)) {
  if (const auto pair = communicator_->port_pair())
    throw Error(
        ErrorCode::unsupported,
        fmt::format("ranks {} and {} reach each other over a network alone, by port channels "
                    "and connections; operations and memory channels do not go over "
                    "networks yet",
                    pair->first, pair->second),
        {communicator_->rank(), -1, Phase::setup});
  const auto size = static_cast<std::size_t>(communicator_->size());
  const auto rank = static_cast<std::size_t>(communicator_->rank());
  std::vector<Places> all(size, mine_);
  std::optional<Error> refused;
  try {
    // An object of before may still be in use at a rank that is slower to destroy it. If that rank
    // keeps it, it waits below for what is found here.
    constexpr std::chrono::milliseconds kMost{2000};
    const Deadline patience = Deadline::after(std::min(communicator_->timeout() / 4, kMost));
    mine_.farewells = communicator_->host_arena().carve(size * sizeof(std::uint64_t), patience);
    mine_.data = communicator_->arena().carve(bytes, patience);
    if (staged_bytes > 0)
      mine_.staged = CommunicatorAccess::staging(*communicator_).carve(staged_bytes, patience);
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
    if (mine_.staged != kNoRoom)
      CommunicatorAccess::staging(*communicator_).give_back(mine_.staged);
    throw;
  }
}

void SharedBlock::open(int peer, const Places& places) {
  if (places.data == kNoRoom)
    throw Error(ErrorCode::capacity,
                fmt::format("the arena of rank {} has no room for this object", peer),
                {communicator_->rank(), peer, Phase::setup});
  std::byte* part = communicator_->arena().part(peer).data();
  bases_.push_back(part == nullptr ? nullptr : part + places.data);
  staged_.push_back(places.staged);
  const auto rank = static_cast<std::size_t>(communicator_->rank());
  my_farewells_.push_back(farewell(places, peer, rank));
}

std::uint64_t* SharedBlock::farewell(const Places& places, int owner, std::size_t writer) const {
  std::byte* part = communicator_->host_arena().part(owner).data();
  return reinterpret_cast<std::uint64_t*>(part + places.farewells) + writer;
}

std::byte* SharedBlock::staged(int rank, std::uint64_t offset, std::size_t bytes) const {
  const std::uint64_t begin = staged_[static_cast<std::size_t>(rank)];
  return CommunicatorAccess::map_staging(*communicator_, rank, begin + offset, bytes);
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
  if (mine_.staged != kNoRoom)
    CommunicatorAccess::staging(*communicator_).give_back_when(mine_.staged, all_left);
  communicator_->host_arena().give_back_when(mine_.farewells, all_left);
}

}  // namespace expertwire
