#pragma once

// What every kernel of an object is given besides its operation. Shared by host and device.

#include <cstddef>
#include <cstdint>

#include "ep/protocol/call.hpp"
#include "ep/protocol/faults.hpp"
#include "ep/protocol/pair.hpp"
#include "expertwire/error.hpp"
#include "expertwire/host_device.hpp"

namespace expertwire::inline v0::ep::cuda {

/// Ranks that kernels reach.
inline constexpr int kMostRanks = 128;
/// Experts over all ranks: kernels count them in shared memory.
inline constexpr int kMostExperts = 8192;

/// What a kernel reports when it cannot go on.
struct Failure {
  ErrorCode code;
  Phase phase;
  std::int32_t peer;  ///< whom it waited for, who is lost, or with whom it disagrees
  Mismatch mismatch;
  std::uint64_t detail;  ///< epoch or row
  std::uint64_t waited_ns;
};

/// Pinned host memory by which kernels and host tell each other things. Loads of it are served one
/// at a time, a microsecond each, and while one is outstanding the releases and fences of its SM
/// take a thousand times as long: only a thread that was elected for it looks here (Patience).
struct HostWords {
  static constexpr std::uint32_t kGoOn = 0, kGiveUp = UINT32_MAX;
  /// Set by the host: leave your waits, because rank `abort - 1` is lost, or (kGiveUp) for good.
  std::uint32_t abort;
  /// Set by kernels, again and again, while they wait for a peer; cleared by the host.
  std::uint32_t awaited[kMostRanks];

  // Written once, by the thread that failed first; `failed` last, released.
  std::uint32_t failed;
  Failure failure;
};

/// What kernels count for the host, which asks when it wants to know.
struct Notices {
  unsigned long long invalid_ids;
  unsigned long long dropped_rows;
  unsigned long long first_invalid_at;  ///< its index + 1; 0: none yet
  std::int64_t first_invalid_id;        ///< the id that was out of range
};

/// Device memory by which the kernels of an object tell each other things.
struct KernelWords {
  std::uint32_t failed;   ///< sticky, tested first by every kernel; set behind the report
  std::uint32_t claimed;  ///< some thread reports
  /// When a thread last looked at the host because of a peer, in nanoseconds.
  unsigned long long looked_at[kMostRanks];
  Notices notices;
};

/// Moments that a block of a kernel notes when it is traced.
enum Mark : std::int32_t {
  kStarted,   ///< first thing
  kAdmitted,  ///< epochs and credit are known
  kSent,      ///< its part of the send half is done
  kCounted,   ///< it knows what comes
  kReceived,  ///< its part of the receive half is done
  kEnded,     ///< last thing (of low-latency dispatch: credit has been given)
  kMarks
};
/// What a traced launch writes: nanoseconds [kMarks][kMostTracedBlocks], 0 where it was not noted.
inline constexpr int kMostTracedBlocks = 256;

struct Context {
  Peer peers[kMostRanks];
  const std::byte* pairs;    ///< in this rank's own memory, that of rank 0
  std::uint64_t pair_bytes;  ///< from pair to pair there
  HostWords* host;
  KernelWords* words;
  std::uint64_t timeout_ns;
  std::uint64_t* trace;  ///< this launch's part of a trace, or null
  std::int32_t rank;
  std::int32_t size;
  std::int32_t couriers;  ///< blocks of a launch behind those that work: 1 if a peer is staged
#if defined(EXPERTWIRE_TEST_FAULTS)
  Fault removed;  ///< a part of the protocol that is taken away
  std::uint32_t longest_delay_ns;
  std::int32_t stop_at;  ///< Phase at which this rank's kernels leave without a word; -1
#endif
};

/// Which halves of an operation a launch is.
enum Halves : std::int32_t { kSendHalf = 1, kReceiveHalf = 2, kBothHalves = 3 };

}  // namespace expertwire::ep::cuda
