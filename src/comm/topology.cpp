#include "expertwire/topology.hpp"

#include <sched.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <map>
#include <mutex>
#include <thread>

#ifdef EXPERTWIRE_HAVE_HWLOC
#include <hwloc.h>
#endif

#include "base/check.hpp"
#include "comm/secret.hpp"

namespace expertwire::inline v0 {

Topology::Topology(std::vector<RankPlace> places, int ranks_per_node) : places_(std::move(places)) {
  std::map<std::string, int> hosts;
  for (RankPlace& place : places_)
    place.node = hosts.try_emplace(place.host, static_cast<int>(hosts.size())).first->second;
  nodes_ = hosts_ = static_cast<int>(hosts.size());
  if (ranks_per_node > 0) {
    check_argument(size() % ranks_per_node == 0,
                   "ranks_per_node is {}; it must divide the number of ranks, {}", ranks_per_node,
                   size());
    nodes_ = size() / ranks_per_node;
    for (int r = 0; r < size(); ++r) places_[static_cast<std::size_t>(r)].node = r / ranks_per_node;
  }
}

int Topology::ranks_on_host(int rank) const {
  return static_cast<int>(std::count_if(places_.begin(), places_.end(), [&](const RankPlace& p) {
    return p.host == place(rank).host;
  }));
}

int Topology::ranks_on_gpu(int rank) const {
  const RankPlace& mine = place(rank);
  if (mine.cuda_device < 0) return 0;
  return static_cast<int>(std::count_if(places_.begin(), places_.end(), [&](const RankPlace& p) {
    return p.host == mine.host && p.gpu == mine.gpu;
  }));
}

namespace {

/// Equal for processes that can reach each other's local sockets and memory: same boot of a
/// kernel, same network namespace.
std::string host_identity() {
  std::array<char, 64> name{};
  ::gethostname(name.data(), name.size() - 1);
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string boot;
  std::getline(file, boot);
  struct stat network {};
  ::stat("/proc/self/ns/net", &network);
  return fmt::format("{}-{}-{}", std::string(name.data()).substr(0, 24), boot.substr(0, 36),
                     network.st_ino);
}

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (::sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(std::thread::hardware_concurrency());
}

#ifdef EXPERTWIRE_HAVE_HWLOC
/// The NUMA node all of whose cores cover this process's, or -1 when it may run on several.
int find_numa_node() {
  hwloc_topology_t topology = nullptr;
  if (hwloc_topology_init(&topology) != 0) return -1;
  int node = -1;
  hwloc_bitmap_t cores = hwloc_bitmap_alloc();
  if (hwloc_topology_load(topology) == 0 &&
      hwloc_get_cpubind(topology, cores, HWLOC_CPUBIND_PROCESS) == 0) {
    hwloc_bitmap_t nodes = hwloc_bitmap_alloc();
    hwloc_cpuset_to_nodeset(topology, cores, nodes);
    if (hwloc_bitmap_weight(nodes) == 1) node = hwloc_bitmap_first(nodes);
    hwloc_bitmap_free(nodes);
  }
  hwloc_bitmap_free(cores);
  hwloc_topology_destroy(topology);
  return node;
}
#else
int find_numa_node() { return -1; }
#endif

}  // namespace

RankPlace local_place() {
  // Drawn anew after a fork: a child is another process.
  static std::mutex mutex;
  static std::pair<int, std::uint64_t> token{0, 0};
  static const int numa_node = find_numa_node();
  RankPlace place;
  place.host = host_identity();
  place.pid = ::getpid();
  std::lock_guard lock(mutex);
  if (token.first != place.pid) {
    token.first = place.pid;
    fill_random(&token.second, sizeof(token.second));
  }
  place.process = token.second;
  place.cores = usable_cores();
  place.numa_node = numa_node;
  return place;
}

}  // namespace expertwire
