#include "comm/shared_block.hpp"

#include <atomic>
#include <optional>

#include "base/check.hpp"

namespace expertwire {

namespace {

constexpr std::uint64_t kNoRoom = UINT64_MAX;

/// Before the block: one word a peer, by which it says that it writes no more.
std::size_t farewell_bytes(int ranks) {
  constexpr std::size_t kAlignment = 128;
  const std::size_t bytes = static_cast<std::size_t>(ranks) * sizeof(std::uint64_t);
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

SharedBlock::SharedBlock(std::shared_ptr<Communicator> communicator, std::size_t bytes)
    : communicator_(std::move(communicator)) {
  Arena& arena = communicator_->arena();
  const int rank = communicator_->rank(), size = communicator_->size();
  std::vector<std::uint64_t> offsets(static_cast<std::size_t>(size));
  std::optional<Error> refused;
  std::uint64_t& mine = offsets[static_cast<std::size_t>(rank)];
  try {
    mine = arena.carve(farewell_bytes(size) + bytes);
  } catch (const Error& error) {
    mine = kNoRoom;
    refused = error;
  }
  offset_ = mine;
  try {
    for (int peer = 0; !refused && peer < size; ++peer)
      reinterpret_cast<std::uint64_t*>(arena.local().data() + mine)[peer] = 0;
    communicator_->all_gather(offsets.data(), sizeof(std::uint64_t));
    if (refused) throw *refused;
    for (int peer = 0; peer < size; ++peer) {
      const std::uint64_t offset = offsets[static_cast<std::size_t>(peer)];
      if (offset == kNoRoom)
        throw Error(ErrorCode::capacity,
                    fmt::format("the arena of rank {} has no room for this object", peer),
                    {rank, peer, Phase::setup});
      std::byte* part = arena.part(peer).data();
      check(part != nullptr, ErrorCode::unsupported, "the memory of rank {} is not mapped here",
            peer);
      bases_.push_back(part + offset + farewell_bytes(size));
    }
  } catch (...) {
    if (offset_ != kNoRoom) arena.give_back(offset_);
    throw;
  }
}

std::uint64_t* SharedBlock::farewell(int owner, int writer) const {
  return reinterpret_cast<std::uint64_t*>(base(owner) - farewell_bytes(communicator_->size())) +
         writer;
}

SharedBlock::~SharedBlock() {
  const int rank = communicator_->rank(), size = communicator_->size();
  for (int peer = 0; peer < size; ++peer)
    std::atomic_ref(*farewell(peer, rank)).store(1, std::memory_order_release);
  const std::uint64_t* first = farewell(rank, 0);
  communicator_->arena().give_back_when(offset_, [first, size] {
    for (int peer = 0; peer < size; ++peer) {
      auto& word = *const_cast<std::uint64_t*>(first + peer);
      if (std::atomic_ref(word).load(std::memory_order_acquire) == 0) return false;
    }
    return true;
  });
}

}  // namespace expertwire
