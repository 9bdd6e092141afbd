#include "comm/memory_registry.hpp"

#include "base/check.hpp"
#include "comm/communicator_access.hpp"
#include "comm/device_memory.hpp"

namespace expertwire::inline v0 {

MemoryRegistry::MemoryRegistry(Setting setting) : setting_(std::move(setting)) {
  for (const Arena* arena : {setting_.host_arena.get(), setting_.device_arena.get()})
    for (std::size_t r = 0; arena != nullptr && r < setting_.endpoints.size(); ++r) {
      const std::uint32_t id = table_.reserve();
      table_.set(id, arena->part(static_cast<int>(r)), id);
    }
}

std::string Memory::serialize() const {
  check(offer_ != nullptr, ErrorCode::invalid_usage,
        "serialize: this memory of rank {} was not registered here; its owner registers it", rank_);
  return *offer_;
}

Memory CommunicatorAccess::numbered(Memory memory, std::uint32_t id, std::string offer) {
  memory.id_ = id;
  if (!offer.empty()) memory.offer_ = std::make_shared<const std::string>(std::move(offer));
  return memory;
}

/// Gives memory of this rank a number, and says of it what peers need.
Memory MemoryRegistry::offer(const Memory& memory) {
  MemoryOffer offer{};
  offer.job = setting_.job;
  offer.rank = setting_.rank;
  offer.kind = memory.kind();
  offer.address = reinterpret_cast<std::uint64_t>(memory.data());
  offer.bytes = memory.bytes();
  offer.arena_offset = MemoryOffer::kNowhere;
  offer.device = -1;
  if (const Arena* arena = arena_of(memory.kind())) {
    const auto begin = reinterpret_cast<std::uint64_t>(arena->local().data());
    const std::uint64_t at = offer.address - begin;
    if (offer.address >= begin && at <= arena->local().bytes() &&
        offer.bytes <= arena->local().bytes() - at)
      offer.arena_offset = at;
  }
  if (memory.kind() == MemoryKind::cuda && !offer.in_arena()) offer_device_memory(offer);
  offer.id = table_.reserve();
  table_.set(offer.id, memory, offer.id);
  return CommunicatorAccess::numbered(
      memory, offer.id,
      format_offer(offer, setting_.make_key ? setting_.make_key(memory) : std::string()));
}

Memory MemoryRegistry::add(void* data, std::size_t bytes, MemoryKind kind) {
  check_argument(data != nullptr, "register_memory: data is null, for {} bytes", bytes);
  const auto address = reinterpret_cast<std::uint64_t>(data);
  check_argument(bytes <= UINT64_MAX - address,
                 "register_memory: bytes is {}; memory at {} has no room for so many", bytes, data);
  // Words in it are addressed by offset, and must be aligned at the owner.
  check_argument(address % sizeof(std::uint64_t) == 0,
                 "register_memory: data is {}; it must be a multiple of 8", data);
  return offer({setting_.rank, not_owned(address), bytes, kind});
}

Memory MemoryRegistry::allocate(std::size_t bytes) {
  const std::shared_ptr<Arena> arena = setting_.host_arena;
  const std::uint64_t offset = arena->carve(bytes);
  std::shared_ptr<std::byte> mapping(arena->local().data() + offset,
                                     [arena, offset](std::byte*) { arena->give_back(offset); });
  return offer({setting_.rank, std::move(mapping), bytes});
}

Memory MemoryRegistry::open(std::string_view serialized) {
  const MemoryOffer offer =
      parse_offer(serialized, setting_.job, static_cast<int>(setting_.endpoints.size()));
  if (offer.rank == setting_.rank) {
    const MemoryTable::Entry* own = table_.find(offer.id);
    check_argument(own != nullptr, "open_memory: memory {} of this rank is not registered any more",
                   offer.id);
    Memory memory(own->rank, not_owned(reinterpret_cast<std::uint64_t>(own->data)), own->bytes,
                  own->kind);
    return CommunicatorAccess::numbered(std::move(memory), offer.id, std::string(serialized));
  }
  const Arena* arena = arena_of(offer.kind);
  check(arena != nullptr, ErrorCode::unsupported,
        "open_memory: memory {} of rank {} is device memory, and this rank is on the CPU backend",
        offer.id, offer.rank);
  const Endpoint& self = setting_.endpoints[static_cast<std::size_t>(setting_.rank)];
  const Endpoint& peer = setting_.endpoints[static_cast<std::size_t>(offer.rank)];
  const Memory memory =
      setting_.wire(offer.rank, offer.kind).open({self, peer, offer, arena->part(offer.rank)});
  const std::uint32_t id = table_.reserve();
  table_.set(id, memory, offer.id, std::string(key_of(serialized)), offer.address);
  return CommunicatorAccess::numbered(memory, id, {});
}

void MemoryRegistry::remove(const Memory& memory) {
  check_argument(table_.remove(memory.id()),
                 "deregister_memory: this memory of rank {} is not registered, or not any more",
                 memory.rank());
}

}  // namespace expertwire
