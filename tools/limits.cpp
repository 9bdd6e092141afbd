#include "limits.hpp"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include "bench.hpp"
#include "ep/cpu/team.hpp"

namespace expertwire::tools {

double free_memory_bytes() {
  double free = std::numeric_limits<double>::max();
  std::ifstream system("/proc/meminfo");
  for (std::string name, unit; system >> name;) {
    double kilobytes = 0;
    if (name == "MemAvailable:" && system >> kilobytes) free = std::min(free, kilobytes * 1024);
    std::getline(system, unit);
  }
  double most = 0, used = 0;
  std::ifstream limit("/sys/fs/cgroup/memory.max"), current("/sys/fs/cgroup/memory.current");
  if (limit >> most && current >> used) free = std::min(free, most - used);  // "max" is no number
  return free;
}

double measure_memcpy(Communicator& communicator, std::size_t bytes, int threads) {
  constexpr std::size_t kRotate = std::size_t{96} << 20;
  if (bytes == 0) return 0;
  const int rounds = static_cast<int>(std::clamp<std::size_t>(4 * kRotate / bytes, 7, 100));
  const std::size_t buffers = std::max<std::size_t>(2, kRotate / bytes);
  std::vector<char> from(bytes * buffers, 1), to(bytes * buffers, 2);
  ep::cpu::Team team(threads);
  std::vector<double> times;
  communicator.barrier();
  for (int round = 0; round < rounds; ++round) {
    const std::size_t offset = static_cast<std::size_t>(round) % buffers * bytes;
    const double start = now_us();
    team.run([&](int worker) {
      const auto part = ep::cpu::part_of(static_cast<std::int64_t>(bytes), worker, team.size());
      const auto begin = offset + static_cast<std::size_t>(part.begin);
      std::memcpy(&to[begin], &from[begin], static_cast<std::size_t>(part.end - part.begin));
    });
    times.push_back(now_us() - start);
  }
  communicator.barrier();
  std::nth_element(times.begin(), times.begin() + rounds / 2, times.end());
  return times[static_cast<std::size_t>(rounds / 2)];
}

}  // namespace expertwire::tools
