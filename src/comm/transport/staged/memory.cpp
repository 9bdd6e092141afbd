#include "comm/transport/staged/memory.hpp"

#include <map>
#include <mutex>
#include <set>
#include <vector>

#include "base/check.hpp"
#include "base/cuda.hpp"

namespace expertwire::inline v0 {

Memory import_staged(const ImportRequest& request) {
  return {request.peer.rank, nullptr, request.peer.cuda.arena_bytes, MemoryKind::cuda};
}

namespace {

constexpr std::uint64_t kGranule = std::uint64_t{2} << 20;

}  // namespace

struct PinnedSegment::State {
  std::shared_ptr<std::byte> mapping;
  std::mutex mutex;
  std::set<std::uint64_t> granules;  // offsets of those that are mapped
  int device = 0;                    // of the rank that mapped one last

  ~State() {
    const DeviceGuard guard(device, std::nothrow);
    for (const std::uint64_t offset : granules) cudaHostUnregister(mapping.get() + offset);
  }
};

/// Those of this process.
struct PinnedSegment::Registry {
  std::mutex mutex;
  std::map<std::byte*, std::weak_ptr<PinnedSegment>> live;  // by where their mappings begin
  std::vector<std::unique_ptr<State>> left;                 // until none is live

  static Registry& get() {
    static auto* registry = new Registry;  // outlives every communicator
    return *registry;
  }
};

PinnedSegment::PinnedSegment(std::shared_ptr<std::byte> mapping)
    : state_(std::make_unique<State>()) {
  state_->mapping = std::move(mapping);
}

std::shared_ptr<PinnedSegment> PinnedSegment::of(const std::shared_ptr<std::byte>& mapping) {
  Registry& registry = Registry::get();
  std::lock_guard lock(registry.mutex);
  std::weak_ptr<PinnedSegment>& known = registry.live[mapping.get()];
  auto segment = known.lock();
  if (!segment) {
    segment.reset(new PinnedSegment(mapping));
    known = segment;
  }
  return segment;
}

PinnedSegment::~PinnedSegment() {
  Registry& registry = Registry::get();
  std::lock_guard lock(registry.mutex);
  registry.left.push_back(std::move(state_));
  std::erase_if(registry.live, [](const auto& entry) { return entry.second.expired(); });
  if (registry.live.empty()) registry.left.clear();
}

std::byte* PinnedSegment::map(int device, std::uint64_t offset, std::size_t bytes) {
  const DeviceGuard guard(device);
  std::lock_guard lock(state_->mutex);
  state_->device = device;
  std::byte* const base = state_->mapping.get();
  for (std::uint64_t at = offset / kGranule * kGranule; at < offset + bytes; at += kGranule) {
    if (state_->granules.contains(at)) continue;
    const cudaError_t result =
        cudaHostRegister(base + at, kGranule, cudaHostRegisterPortable | cudaHostRegisterMapped);
    if (result != cudaSuccess) cudaGetLastError();
    check(result == cudaSuccess, ErrorCode::system,
          "a GPU cannot map {} bytes of host memory, by which it reaches another ({}); the limit "
          "on locked memory (ulimit -l), a container's on shared memory, or too little free memory "
          "may be why",
          kGranule, cudaGetErrorString(result));
    state_->granules.insert(at);
    void* seen = nullptr;
    check_cuda(cudaHostGetDevicePointer(&seen, base + at, 0), "cudaHostGetDevicePointer");
    check(seen == base + at, ErrorCode::unsupported,
          "a GPU maps host memory at another address than the host, which the staged path does not "
          "know");
  }
  return base + offset;
}

}  // namespace expertwire
