#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "expertwire/bootstrap.hpp"
#include "expertwire/connection.hpp"
#include "expertwire/error.hpp"
#include "expertwire/memory.hpp"
#include "expertwire/topology.hpp"

namespace expertwire::inline v0 {

/// What a communicator is made with; everything unset comes from the environment.
struct CommunicatorOptions {
  /// The CUDA device whose memory this rank's tensors lie in; unset: host memory, the CPU backend.
  /// All ranks use one backend. Several ranks may share a device if they are threads of one process
  /// (they then divide its SMs), or if MPS runs.
  std::optional<int> cuda_device;
  std::optional<std::size_t> arena_bytes;    ///< EXPERTWIRE_ARENA_BYTES
  std::optional<int> ranks_per_node;         ///< EXPERTWIRE_RANKS_PER_NODE
  std::optional<std::string> staged_pairs;   ///< EXPERTWIRE_STAGED_PAIRS
  std::optional<std::string> network_pairs;  ///< EXPERTWIRE_NETWORK_PAIRS
  std::optional<int> proxies;                ///< EXPERTWIRE_PROXIES
  /// EXPERTWIRE_PEER_TIMEOUT_MS: silence after which a peer behind the network is taken for dead.
  std::optional<std::chrono::milliseconds> peer_timeout;
  std::optional<std::chrono::milliseconds> timeout;  ///< EXPERTWIRE_TIMEOUT_MS
};

/// CUDA devices that this process sees; 0 in builds without CUDA and where there is no driver.
int cuda_device_count() noexcept;

enum class PathKind : std::uint8_t {
  mapped = 0,  ///< its memory is loaded from and stored to
  staged = 1,  ///< both ranks' GPUs load from and store to host memory, which stands between them
  port = 2,    ///< a proxy of this rank carries what is for it over a network
};
std::string_view to_string(PathKind kind) noexcept;

/// How a rank reaches a peer.
struct Path {
  PathKind kind = PathKind::mapped;
  std::string transport;
  std::string why;  ///< a few words: what made it possible
};

/// The ranks of a job, how they reach each other, and the memory they share.
///
/// Made collectively. Destroying it is local and never waits for what a peer does; where peers are
/// behind a network, what is under way to them goes out first, for two seconds at most. A peer that
/// still needs this rank then gets `Error{peer_lost}`. Objects made from it keep it alive. A thread
/// of its own looks after the peers: it sleeps until one of them ends. A process that forks goes on
/// with it; the child must not use it, or objects made from it, and may only let go of them.
class Communicator {
 public:
  /// Throws `Error{mismatch}` if ranks run different versions or backends, `Error{unsupported}` if
  /// a peer can be reached by no wire of this build, or if the build has no CUDA and it is asked
  /// for.
  static std::shared_ptr<Communicator> create(std::shared_ptr<Bootstrap> bootstrap,
                                              const CommunicatorOptions& options = {});
  /// A communicator over bootstrap_from_environment().
  static std::shared_ptr<Communicator> from_environment(const CommunicatorOptions& options = {});

  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  int rank() const noexcept;
  int size() const noexcept;
  const Topology& topology() const noexcept;
  /// The CUDA device of this rank, or -1 on the CPU backend.
  int cuda_device() const noexcept;
  /// What operations work in: host memory, or memory of the CUDA device.
  Arena& arena() noexcept;
  /// Host memory of all ranks that are reached by load and store, for words by which hosts tell
  /// each other things. The same as arena() on the CPU backend.
  Arena& host_arena() noexcept;
  /// Makes `bytes` at `data`, of the user, known to this communicator, so that peers can be let in:
  /// host memory, or memory of a CUDA device that this process owns. Local. The memory stays the
  /// user's, who keeps it until peers have stopped writing and deregister_memory() was called.
  ///
  /// Ranks of this process, and ranks behind a network, reach all registered memory. Host memory of
  /// another process can be mapped only if it was made for that: peers of this host open what
  /// allocate_memory() gave, and refuse other host memory by name.
  ///
  /// Throws `Error{invalid_argument}` if `data` is null, not 8-byte aligned or not memory of that
  /// kind, `Error{capacity}` past 2^20 registrations in the life of a communicator.
  Memory register_memory(void* data, std::size_t bytes, MemoryKind kind = MemoryKind::host);
  /// Host memory that every peer can open, registered: a part of this rank's arena, 4096-byte
  /// aligned, content unspecified. It goes back when it has been deregistered and the last copy of
  /// the Memory is gone. On the CUDA backend kernels read and write it, too. Throws
  /// `Error{capacity}` if the arena has no room.
  Memory allocate_memory(std::size_t bytes);
  /// From now on what peers send there is refused. They must have been flushed before. Local.
  void deregister_memory(const Memory& memory);
  /// Opens memory that its owner has serialized. Local. Throws `Error{invalid_argument}` if the
  /// bytes are not what serialize() gave in this job, and `Error{unsupported}`, with what to do, if
  /// the path to the owner does not reach it.
  Memory open_memory(std::string_view serialized);

  /// How this rank writes to `peer`; `peer` may be this rank.
  Connection& connection(int peer);
  /// How operations reach `peer`, which may be this rank: asked for when the communicator was made,
  /// pair by pair. Both ranks of a pair have the same path.
  const Path& path(int peer) const;
  /// Two ranks whose path is staged, if there are any; the same on all ranks. Objects then have no
  /// pool (`Error{unsupported}`), and an operation takes one SM more than it works with, so two at
  /// least.
  std::optional<std::pair<int, int>> staged_pair() const noexcept;
  /// Two ranks whose path is a port, if there are any; the same on all ranks. Port channels and
  /// connections work between all ranks; objects that load and store, operations and memory
  /// channels, then throw `Error{unsupported}`.
  std::optional<std::pair<int, int>> port_pair() const noexcept;
  /// The deadline of every wait that names none.
  std::chrono::milliseconds timeout() const noexcept;

  /// Collective; for setup and tests, not for hot paths.
  void all_gather(void* data, std::size_t bytes_per_rank);
  void barrier();

  /// Whether peers still live, as far as is known: no system call. Any thread. Returns an error to
  /// throw if one died, or if `awaited` (when >= 0) has left. What a rank wrote before it left is
  /// visible once this has said so: look at what you wait for once more before you give up.
  std::optional<Error> find_lost_peer(int awaited);

  /// One line: version, backend, ranks, wires and why each was chosen.
  const std::string& banner() const noexcept;

 private:
  friend struct CommunicatorAccess;
  struct Impl;
  explicit Communicator(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace expertwire
