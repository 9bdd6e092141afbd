#include "base/check.hpp"
#include "base/cuda.hpp"
#include "comm/proxy/fifo.hpp"

namespace expertwire::inline v0 {

std::shared_ptr<std::uint64_t> make_kernel_word() {
  constexpr std::size_t kLine = 64;
  return std::static_pointer_cast<std::uint64_t>(allocate_pinned(kLine));
}

std::unique_ptr<Fifo> Fifo::for_kernels(int device, std::uint64_t capacity) {
  check_argument(capacity >= 2 && (capacity & (capacity - 1)) == 0,
                 "Fifo: capacity is {}; it must be a power of two, 2 at least", capacity);
  struct Memory {
    std::shared_ptr<void> host, device;
  };
  constexpr std::size_t kLine = 64;
  auto memory = std::make_shared<Memory>();
  const auto stream = make_cuda_stream(device);
  memory->host = allocate_pinned(capacity * sizeof(Trigger) + kLine);
  memory->device = allocate_on_device(kLine, device, stream);
  const DeviceGuard guard(device);
  check_cuda(cudaMemsetAsync(memory->device.get(), 0, kLine, stream.get()), "cudaMemsetAsync");
  check_cuda(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
  FifoView view;
  view.slots = static_cast<Trigger*>(memory->host.get());
  view.tail = reinterpret_cast<std::uint64_t*>(view.slots + capacity);
  view.head = static_cast<std::uint64_t*>(memory->device.get());
  view.tail_seen = view.head + 1;
  view.capacity = capacity;
  return std::make_unique<Fifo>(view, std::move(memory));
}

}  // namespace expertwire
