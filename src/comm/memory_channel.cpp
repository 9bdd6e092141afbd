#include "expertwire/memory_channel.hpp"

#include <atomic>
#include <cstring>

#include "base/check.hpp"
#include "comm/device_words.hpp"
#include "comm/shared_block.hpp"
#include "comm/wait.hpp"

namespace expertwire::inline v0 {

namespace {

constexpr std::size_t kLine = 64;

/// Per peer a semaphore line, then an inbox.
std::size_t stride_of(std::size_t bytes) { return kLine + (bytes + kLine - 1) / kLine * kLine; }

}  // namespace

struct MemoryChannel::Impl {
  std::shared_ptr<SharedBlock> block;
  int peer = 0;
  std::size_t bytes = 0;
  std::byte* mine = nullptr;    // semaphore that the peer counts up, then the inbox
  std::byte* theirs = nullptr;  // the same at the peer
  std::uint64_t expected = 0;
  std::shared_ptr<DeviceWords> device;  // set on the CUDA backend

  /// What the peer has counted up to.
  std::uint64_t count() const {
    if (device) return device->read(reinterpret_cast<const std::uint64_t*>(mine));
    return semaphore(mine).load(std::memory_order_acquire);
  }
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
  check_argument(communicator != nullptr, "MemoryChannel::open_all: communicator is null");
  const int rank = communicator->rank(), size = communicator->size();
  std::vector<std::uint64_t> sizes(static_cast<std::size_t>(size));
  const std::size_t stride = stride_of(bytes);
  auto block = std::make_shared<SharedBlock>(communicator, static_cast<std::size_t>(size) * stride);
  auto line = [&](int owner, int writer) {
    return block->base(owner) + static_cast<std::size_t>(writer) * stride;
  };
  std::shared_ptr<DeviceWords> device;
  if (communicator->cuda_device() >= 0)
    device = std::make_shared<DeviceWords>(communicator->cuda_device());
  for (int peer = 0; peer < size; ++peer) {
    if (device)
      device->zero(line(rank, peer), kLine);
    else
      Impl::semaphore(line(rank, peer)).store(0);
  }
  if (device) device->flush(Deadline::after(communicator->timeout()));
  // This gather is also the barrier after which peers may write.
  sizes[static_cast<std::size_t>(rank)] = bytes;
  communicator->all_gather(sizes.data(), sizeof(std::uint64_t));
  std::vector<MemoryChannel> channels;
  for (int peer = 0; peer < size; ++peer) {
    check(sizes[static_cast<std::size_t>(peer)] == bytes, ErrorCode::mismatch,
          "MemoryChannel: rank {} opens inboxes of {} bytes, rank {} of {}", peer,
          sizes[static_cast<std::size_t>(peer)], rank, bytes);
    auto impl = std::make_unique<Impl>();
    impl->block = block;
    impl->peer = peer;
    impl->bytes = bytes;
    impl->device = device;
    impl->mine = line(rank, peer);
    impl->theirs = line(peer, rank);
    channels.push_back(MemoryChannel(std::move(impl)));
  }
  return channels;
}

void MemoryChannel::check_open() const {
  check(impl_ != nullptr, ErrorCode::invalid_usage,
        "this MemoryChannel has been moved from; use the one that it was moved to");
}

int MemoryChannel::peer() const noexcept { return impl_ ? impl_->peer : -1; }
std::byte* MemoryChannel::inbox() const noexcept { return impl_ ? impl_->mine + kLine : nullptr; }
std::size_t MemoryChannel::bytes() const noexcept { return impl_ ? impl_->bytes : 0; }

void MemoryChannel::put(std::uint64_t offset, const void* source, std::size_t bytes) {
  check_open();
  check_argument(source != nullptr || bytes == 0, "MemoryChannel::put: source is null");
  check_argument(offset <= impl_->bytes && bytes <= impl_->bytes - offset,
                 "MemoryChannel::put: bytes {} to {} lie outside the inbox of {} bytes", offset,
                 offset + bytes, impl_->bytes);
  if (impl_->device)
    impl_->device->copy(impl_->theirs + kLine + offset, source, bytes);
  else if (bytes > 0)
    std::memcpy(impl_->theirs + kLine + offset, source, bytes);
}

void MemoryChannel::signal() {
  check_open();
  if (impl_->device)
    impl_->device->add(reinterpret_cast<std::uint64_t*>(impl_->theirs), 1);
  else
    Impl::semaphore(impl_->theirs).fetch_add(1, std::memory_order_release);
}

void MemoryChannel::wait(std::chrono::milliseconds timeout) {
  check_open();
  const std::uint64_t target = impl_->expected + 1;
  const WaitContext context{&impl_->block->communicator(), Deadline::after(timeout),
                            "MemoryChannel::wait", 1000};
  wait_until(context, impl_->peer, Phase::channel, target,
             [&] { return impl_->count() >= target; });
  impl_->expected = target;
}

MemoryChannelDevice MemoryChannel::device() const {
  check_open();
  check(impl_->device != nullptr, ErrorCode::invalid_usage,
        "MemoryChannel::device: the communicator is on the CPU backend");
  auto word = [](std::byte* line) { return reinterpret_cast<std::uint64_t*>(line); };
  return {impl_->mine + kLine, impl_->theirs + kLine, word(impl_->mine), word(impl_->theirs),
          impl_->bytes};
}

}  // namespace expertwire
