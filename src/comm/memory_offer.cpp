#include "comm/memory_offer.hpp"

#include <cstring>

#include "base/check.hpp"

namespace expertwire::inline v0 {

namespace {

constexpr std::uint64_t kMagic = 0x65772d6d656d3031;  // "ew-mem01"

}  // namespace

MemoryOffer parse_offer(std::string_view text, std::uint64_t job, int ranks) {
  MemoryOffer offer{};
  check_argument(text.size() >= sizeof(offer),
                 "open_memory: {} bytes are no serialized memory, which has at least {}",
                 text.size(), sizeof(offer));
  std::memcpy(&offer, text.data(), sizeof(offer));
  check_argument(offer.magic == kMagic && offer.key_bytes == text.size() - sizeof(offer) &&
                     (offer.kind == MemoryKind::host || offer.kind == MemoryKind::cuda),
                 "open_memory: these {} bytes are not what Memory::serialize gave", text.size());
  check_argument(offer.job == job && offer.rank >= 0 && offer.rank < ranks,
                 "open_memory: the memory was serialized in another job (rank {} of {} ranks here)",
                 offer.rank, ranks);
  return offer;
}

std::string format_offer(MemoryOffer offer, std::string_view key) {
  offer.magic = kMagic;
  offer.key_bytes = key.size();
  std::string text(sizeof(offer), '\0');
  std::memcpy(text.data(), &offer, sizeof(offer));
  return text.append(key);
}

std::string_view key_of(std::string_view text) { return text.substr(sizeof(MemoryOffer)); }

std::shared_ptr<std::byte> not_owned(std::uint64_t address) {
  return {reinterpret_cast<std::byte*>(address), [](std::byte*) {}};
}

Memory part_of_arena(const MemoryOffer& offer, const Memory& arena) {
  check_argument(
      offer.arena_offset <= arena.bytes() && offer.bytes <= arena.bytes() - offer.arena_offset,
      "open_memory: bytes {} to {} lie outside the arena of rank {}, which has {}",
      offer.arena_offset, offer.arena_offset + offer.bytes, offer.rank, arena.bytes());
  std::byte* data = arena.data() == nullptr ? nullptr : arena.data() + offer.arena_offset;
  return {offer.rank, std::shared_ptr<std::byte>(arena.shared(), data), offer.bytes, offer.kind};
}

}  // namespace expertwire
