#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "expertwire/deadline.hpp"

namespace expertwire::inline v0 {

/// How the ranks of a job find each other and agree on things before any fast path exists.
///
/// Calls are collective: every rank makes the same calls in the same order with the same sizes.
/// They block until all ranks have come, or throw `Error{timeout}` at the deadline or
/// `Error{peer_lost}` when a rank has gone. One thread at a time.
class Bootstrap {
 public:
  Bootstrap() = default;
  Bootstrap(const Bootstrap&) = delete;
  Bootstrap& operator=(const Bootstrap&) = delete;
  virtual ~Bootstrap() = default;

  virtual int rank() const noexcept = 0;
  virtual int size() const noexcept = 0;
  /// One word for the banner: "rendezvous", "in-process" or "callback".
  virtual std::string_view kind() const noexcept = 0;

  /// `data` has room for `size() * bytes_per_rank` bytes; on entry this rank's part (at
  /// `rank() * bytes_per_rank`) is filled, on return all parts are.
  virtual void all_gather(void* data, std::size_t bytes_per_rank, Deadline deadline) = 0;
  /// Returns after every rank has entered.
  virtual void barrier(Deadline deadline);
  /// Copies `bytes` at `data` from rank `root` to all ranks.
  virtual void broadcast(void* data, std::size_t bytes, int root, Deadline deadline);
};

/// What a rendezvous over sockets needs to know.
struct RendezvousRequest {
  int rank = 0;
  int size = 1;
  /// "host:port" on which rank 0 listens, or "@name" for a local socket that leaves no file.
  std::string address;
  /// At least 16 bytes that only the ranks of this job know. It is never sent or logged: both
  /// sides prove by HMAC-SHA256 over fresh random numbers that they hold it.
  std::string secret;
  std::chrono::milliseconds timeout{30000};
};

/// Joins the rendezvous. Rank 0 listens, the others connect. Strangers (wrong secret, wrong job, or
/// no answer) are dropped, counted and logged, and do not delay the job.
std::shared_ptr<Bootstrap> bootstrap_from_rendezvous(const RendezvousRequest& request);

/// Joins the rendezvous that the environment describes: that of `expertwire launch`, torchrun,
/// mpirun or srun (docs/environment.md). A process that nobody launched is a job of one rank.
std::shared_ptr<Bootstrap> bootstrap_from_environment();

/// Bootstraps for `size` ranks that are threads of this process; element i is rank i's.
std::vector<std::shared_ptr<Bootstrap>> bootstrap_in_process(int size);

/// A bootstrap over somebody else's all-gather: a torch process group, an mpi4py communicator.
struct CallbackRequest {
  int rank = 0;
  int size = 1;
  /// Same meaning as Bootstrap::all_gather. Must throw or return by the deadline.
  std::function<void(void* data, std::size_t bytes_per_rank, Deadline deadline)> all_gather;
};
std::shared_ptr<Bootstrap> bootstrap_from_callback(CallbackRequest request);

/// Runs `body(bootstrap)` on `size` threads, one a rank, and returns when all have ended. If bodies
/// throw, the exception of the lowest rank whose error is not a consequence of another rank's
/// leaving is rethrown; the log has them all (EXPERTWIRE_LOG=info).
void run_in_process(int size, const std::function<void(std::shared_ptr<Bootstrap>)>& body);

}  // namespace expertwire
