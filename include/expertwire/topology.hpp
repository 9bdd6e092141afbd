#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace expertwire::inline v0 {

/// What is known about where one rank runs.
struct RankPlace {
  std::string host;           ///< kernel boot and network namespace: two containers may differ
  std::uint64_t process = 0;  ///< equal for ranks that are threads of one process
  int pid = 0;
  int cores = 0;                        ///< cores that the process may use
  int numa_node = -1;                   ///< -1: not known
  int cuda_device = -1;                 ///< ordinal in its process; -1 on the CPU backend
  std::array<unsigned char, 16> gpu{};  ///< UUID of that device
  int node = 0;                         ///< index of the node, ascending from 0 with the rank
};

/// Where all ranks run; the same on every rank.
///
/// A *node* is what the user calls one: a host, or `ranks_per_node` consecutive ranks where that is
/// set, so that one machine can stand for several. Who reaches whom, and how, does not follow from
/// it: see Communicator::path().
class Topology {
 public:
  Topology() = default;
  /// Derives nodes. `ranks_per_node` 0 makes every host a node.
  Topology(std::vector<RankPlace> places, int ranks_per_node);

  int size() const noexcept { return static_cast<int>(places_.size()); }
  const RankPlace& place(int rank) const { return places_[static_cast<std::size_t>(rank)]; }
  int nodes() const noexcept { return nodes_; }
  int hosts() const noexcept { return hosts_; }
  int node_of(int rank) const { return place(rank).node; }
  /// Ranks on the host of `rank`, itself included.
  int ranks_on_host(int rank) const;
  /// Ranks whose GPU is that of `rank`, itself included; 0 on the CPU backend.
  int ranks_on_gpu(int rank) const;

 private:
  std::vector<RankPlace> places_;
  int nodes_ = 0;
  int hosts_ = 0;
};

/// Where this process runs (node is left 0).
RankPlace local_place();

}  // namespace expertwire
