#include "expertwire/memory_channel.hpp"

#include <atomic>
#include <cstring>

#include "base/check.hpp"
#include "comm/wait.hpp"

namespace expertwire {

namespace {

constexpr std::size_t kLine = 64;

/// A rank's block: per peer a semaphore line, then an inbox.
struct Block {
  std::shared_ptr<Communicator> communicator;
  std::uint64_t offset;
  ~Block() { communicator->arena().give_back(offset); }
};

std::size_t stride_of(std::size_t bytes) { return kLine + (bytes + kLine - 1) / kLine * kLine; }

}  // namespace

struct MemoryChannel::Impl {
  std::shared_ptr<Block> block;
  int peer = 0;
  std::size_t bytes = 0;
  std::byte* mine = nullptr;    // semaphore that the peer counts up, then the inbox
  std::byte* theirs = nullptr;  // the same at the peer
  std::uint64_t expected = 0;

  static std::atomic_ref<std::uint64_t> semaphore(std::byte* line) {
    return std::atomic_ref(*reinterpret_cast<std::uint64_t*>(line));
  }
};

MemoryChannel::MemoryChannel(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
MemoryChannel::MemoryChannel(MemoryChannel&&) noexcept = default;
MemoryChannel& MemoryChannel::operator=(MemoryChannel&&) noexcept = default;
MemoryChannel::~MemoryChannel() = default;

std::vector<MemoryChannel> MemoryChannel::open_all(
    const std::shared_ptr<Communicator>& communicator, std::size_t bytes) {
  Arena& arena = communicator->arena();
  const auto size = static_cast<std::size_t>(communicator->size());
  const std::size_t stride = stride_of(bytes);
  struct Offer {
    std::uint64_t offset;
    std::uint64_t bytes;
  };
  std::vector<Offer> offers(size);
  auto& mine = offers[static_cast<std::size_t>(communicator->rank())];
  mine = {arena.carve(size * stride), bytes};
  const std::shared_ptr<Block> block(new Block{communicator, mine.offset});
  // After the gather no peer still writes for an object that had this memory before.
  communicator->all_gather(offers.data(), sizeof(Offer));
  for (std::size_t r = 0; r < size; ++r)
    Impl::semaphore(arena.local().data() + block->offset + r * stride).store(0);
  communicator->barrier();

  std::vector<MemoryChannel> channels;
  for (int peer = 0; peer < communicator->size(); ++peer) {
    const Offer& offer = offers[static_cast<std::size_t>(peer)];
    check(offer.bytes == bytes, ErrorCode::mismatch,
          "MemoryChannel: rank {} opens inboxes of {} bytes, rank {} of {}", peer, offer.bytes,
          communicator->rank(), bytes);
    std::byte* theirs = arena.part(peer).data();
    check(theirs != nullptr, ErrorCode::unsupported,
          "MemoryChannel: rank {} is outside the domain of rank {}", peer, communicator->rank());
    auto impl = std::make_unique<Impl>();
    impl->block = block;
    impl->peer = peer;
    impl->bytes = bytes;
    impl->mine = arena.local().data() + block->offset + static_cast<std::size_t>(peer) * stride;
    impl->theirs = theirs + offer.offset + static_cast<std::size_t>(communicator->rank()) * stride;
    channels.push_back(MemoryChannel(std::move(impl)));
  }
  return channels;
}

int MemoryChannel::peer() const noexcept { return impl_->peer; }
std::byte* MemoryChannel::inbox() const noexcept { return impl_->mine + kLine; }
std::size_t MemoryChannel::bytes() const noexcept { return impl_->bytes; }

void MemoryChannel::put(std::uint64_t offset, const void* source, std::size_t bytes) {
  check_argument(offset <= impl_->bytes && bytes <= impl_->bytes - offset,
                 "MemoryChannel::put: bytes {} to {} lie outside the inbox of {} bytes", offset,
                 offset + bytes, impl_->bytes);
  std::memcpy(impl_->theirs + kLine + offset, source, bytes);
}

void MemoryChannel::signal() {
  Impl::semaphore(impl_->theirs).fetch_add(1, std::memory_order_release);
}

void MemoryChannel::wait(std::chrono::milliseconds timeout) {
  const std::uint64_t target = impl_->expected + 1;
  const WaitContext context{impl_->block->communicator.get(), Deadline::after(timeout),
                            "MemoryChannel::wait", 1000};
  wait_until(context, impl_->peer, Phase::channel, target, [&] {
    return Impl::semaphore(impl_->mine).load(std::memory_order_acquire) >= target;
  });
  impl_->expected = target;
}

}  // namespace expertwire
