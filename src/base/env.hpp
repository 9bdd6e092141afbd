#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace expertwire::inline v0 {

/// The environment, read once at first use. Nothing else in expertwire calls getenv; what is
/// written is set_unless_set() alone. The meaning of every variable is in env.cpp, from which
/// docs/environment.md is made.
struct Env {
  // Logging.
  std::string log;
  std::string log_subsystems;
  std::string log_file;

  // Who this process is in the job.
  std::optional<int> rank;
  std::optional<int> size;
  std::optional<int> local_size;
  std::string launcher;  ///< which launcher the three above came from
  std::string job;       ///< a name that all ranks of the job know
  std::string rendezvous;
  std::string secret;
  std::string secret_file;
  std::string runtime_dir;

  // Resources and limits.
  std::int64_t timeout_ms;
  std::optional<std::int64_t> arena_bytes;
  std::string cuda_memory;   ///< auto, posix_fd, fabric or ipc
  std::string cuda_copies;   ///< auto or vector
  std::string staged_pairs;  ///< empty: not said
  std::string mps_pipe;
  int ranks_per_node;
  int threads;
  int proxies;                ///< 0: by cores
  std::string ucx;            ///< auto, off, or the library's path
  std::string remote_writes;  ///< auto, on or off
  std::string network_pairs;  ///< empty: not said
  std::int64_t nic_bytes;
  std::int64_t peer_timeout_ms;
  int sender_warps;  ///< 0: by formula
  int ring_bytes;    ///< 0: by formula
  double link_gbps;  ///< 0: measured
  std::uint32_t first_epoch;

  static const Env& get();
  /// Reads the environment anew; for tests.
  static Env read();
};

/// Sets a variable that is unset, of a library that reads its settings from the environment alone.
void set_unless_set(const char* name, const char* value);

/// The text of docs/environment.md.
std::string environment_page();

}  // namespace expertwire
