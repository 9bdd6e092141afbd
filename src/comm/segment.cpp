#include "comm/segment.hpp"

#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "base/check.hpp"
#include "base/process.hpp"

namespace expertwire::inline v0 {

namespace {

/// Segments of this process, so that thread ranks share one mapping.
struct Registry {
  std::mutex mutex;
  std::uint64_t next_id = 1;
  std::map<std::uint64_t, std::weak_ptr<std::byte>> segments;  // of ranks that have not left
  struct Listener {
    std::weak_ptr<Fd> event;
    OwnProcess process;  // in a forked child the descriptor's number may be another's by now
  };
  std::vector<Listener> listeners;
};

Registry& registry() {
  static Registry instance;
  return instance;
}

}  // namespace

std::shared_ptr<std::byte> map_segment(const Fd& fd, std::size_t bytes) {
  void* data =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd.get(), 0);
  check(data != MAP_FAILED, ErrorCode::system,
        "mapping an arena of {} bytes failed: {}; a smaller EXPERTWIRE_ARENA_BYTES may help", bytes,
        std::strerror(errno));
  ::madvise(data, bytes, MADV_DONTDUMP);
  return {static_cast<std::byte*>(data), [bytes](std::byte* p) { ::munmap(p, bytes); }};
}

Segment create_segment(std::size_t bytes) {
  Segment segment;
  segment.bytes = bytes;
  segment.fd = Fd(check_system(::memfd_create("expertwire", MFD_CLOEXEC), "memfd_create"));
  check_system(::ftruncate(segment.fd.get(), static_cast<off_t>(bytes)), "ftruncate of a memfd");
  segment.mapping = map_segment(segment.fd, bytes);
  segment.id = register_mapping(segment.mapping);
  return segment;
}

std::uint64_t register_mapping(const std::shared_ptr<std::byte>& mapping) {
  Registry& all = registry();
  std::lock_guard lock(all.mutex);
  const std::uint64_t id = all.next_id++;
  all.segments[id] = mapping;
  return id;
}

void retire_segment(std::uint64_t id) {
  Registry& all = registry();
  std::lock_guard lock(all.mutex);
  all.segments.erase(id);
  std::erase_if(all.listeners, [](const Registry::Listener& listener) {
    const auto event = listener.event.lock();
    const bool ours = event && listener.process.here();
    if (ours) ::eventfd_write(event->get(), 1);
    return !ours;
  });
}

void notify_of_retirements(const std::shared_ptr<Fd>& event) {
  Registry& all = registry();
  std::lock_guard lock(all.mutex);
  all.listeners.push_back({event, {}});
}

bool segment_retired(std::uint64_t id) {
  Registry& all = registry();
  std::lock_guard lock(all.mutex);
  return !all.segments.contains(id);
}

std::shared_ptr<std::byte> find_segment(std::uint64_t id) {
  Registry& all = registry();
  std::lock_guard lock(all.mutex);
  auto it = all.segments.find(id);
  return it == all.segments.end() ? nullptr : it->second.lock();
}

}  // namespace expertwire
