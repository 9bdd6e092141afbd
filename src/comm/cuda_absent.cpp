// The comm layer's share of CUDA in builds without it.
#include "base/check.hpp"
#include "comm/device_memory.hpp"
#include "comm/device_words.hpp"
#include "comm/proxy/fifo.hpp"
#include "comm/transport/staged/memory.hpp"
#include "comm/transport/transport.hpp"
#include "expertwire/communicator.hpp"

namespace expertwire::inline v0 {

namespace {

[[noreturn]] void refuse() {
  throw Error(ErrorCode::unsupported,
              "this build of expertwire has no CUDA: nvcc was not found when it was built");
}

}  // namespace

DeviceSegment create_device_segment(int, std::size_t) { refuse(); }
void offer_device_memory(MemoryOffer&) { refuse(); }
std::size_t default_device_arena(int) { refuse(); }
bool mps_runs() { return false; }
int cuda_device_count() noexcept { return 0; }

std::unique_ptr<Transport> make_cuda_ipc_transport() { return nullptr; }
std::unique_ptr<Transport> make_staged_transport() { return nullptr; }

struct PinnedSegment::State {};
std::shared_ptr<PinnedSegment> PinnedSegment::of(const std::shared_ptr<std::byte>&) { refuse(); }
PinnedSegment::~PinnedSegment() = default;
std::byte* PinnedSegment::map(int, std::uint64_t, std::size_t) { refuse(); }

std::shared_ptr<std::uint64_t> make_kernel_word() { refuse(); }
std::unique_ptr<Fifo> Fifo::for_kernels(int, std::uint64_t) { refuse(); }

DeviceWords::DeviceWords(int) { refuse(); }
DeviceWords::~DeviceWords() = default;
void DeviceWords::copy(void*, const void*, std::size_t) const { refuse(); }
void DeviceWords::set(std::uint64_t*, std::uint64_t) const { refuse(); }
void DeviceWords::add(std::uint64_t*, std::int64_t) const { refuse(); }
std::uint64_t DeviceWords::read(const std::uint64_t*) const { refuse(); }
void DeviceWords::zero(void*, std::size_t) const { refuse(); }
void DeviceWords::flush(Deadline) const { refuse(); }

}  // namespace expertwire
