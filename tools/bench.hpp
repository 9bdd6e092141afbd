#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "expertwire/communicator.hpp"
#include "expertwire/high_throughput.hpp"
#include "expertwire/shape.hpp"
#include "reference/round_trip.hpp"

namespace expertwire::tools {

/// What `expertwire bench` was asked for.
struct BenchOptions {
  bool high_throughput = false;
  std::string model = "deepseek-v3";
  MoeShape shape;  ///< from the model, or given
  std::string routing = "uniform";
  int ranks = 0;  ///< 0: those of a launcher, else 2
  int iterations = 50;
  int warmup = 10;
  int lanes = 1;
  int threads = 0;
  std::uint64_t seed = 1;
  bool verify = true;
  HighThroughput::Output output = HighThroughput::Output::pool;
  HighThroughput::Layout layout = HighThroughput::Layout::token_major;
  int alignment = 1;  ///< of groups, expert-major

  bool grouped() const { return layout == HighThroughput::Layout::expert_major; }
  /// Rows that a rank's output has at most.
  std::int64_t most_rows(int of_ranks) const;
  reference::RoundTripOptions::Weights weights = reference::RoundTripOptions::Weights::dispatch;
  std::string peer;
  std::string json;
  std::string device = "auto";  ///< cpu, cuda or auto
  int sms = 0;                  ///< CUDA: SMs of a rank; 0: all it has
  std::vector<int> sweep;       ///< CUDA: several of those, one after the other, in one table
  bool tune = false;            ///< CUDA: hold the formulas against a sweep
  bool fp8 = false;             ///< rows travel as fp8: ll casts them, ht is given them
  bool trace = false;           ///< CUDA: also print when blocks did what
  double late_us = 0;           ///< also time operations to which one rank comes so late

  /// Of a dispatched row, scales included.
  std::size_t dispatch_row_bytes() const;
};

/// Rows of one rank in one step, averaged over the steps that are rotated through.
struct Traffic {
  double selections = 0;  ///< T * K rows
  double unique = 0;      ///< one row per (token, rank), the own rank included
  double wire = 0;        ///< unique without the own rank
};

/// What one rank measured: microseconds of every iteration.
struct Timings {
  std::vector<double> dispatch;
  std::vector<double> combine;
};

/// What a comparison with another library took.
struct Peer {
  std::string name;
  std::string version;
  Timings timings;
};

/// All that a run on one rank brings to the report.
struct Measurement {
  Timings timings;
  std::vector<Peer> peers;  ///< of `--peer`, if asked for
  Traffic traffic;
  reference::Skew skew;
  reference::Report report;
  Timings late;          ///< of operations to which one rank comes late: kernels, or the host's
  double memcpy_us = 0;  ///< to copy the unique bytes once, all ranks at the same time
  std::size_t unique_bytes = 0;
  std::size_t arena_bytes = 0;
  std::size_t staged_bytes = 0;  ///< host memory for what staged peers write
  int threads = 1;

  // CUDA alone.
  int sms = 0;
  Timings stream;                    ///< between events on a stream, operations back to back
  Timings kernel;                    ///< from the first start of a block to the last end
  std::vector<double> graph_pair;    ///< period of a pair in a graph, one value a round
  std::vector<std::string> moments;  ///< what blocks did when, a line an operation
  double burst_us = 0;           ///< to store combine's wire bytes to all peers, with no protocol
  double dispatch_burst_us = 0;  ///< the same for dispatch's
};

/// One point of a sweep, on one rank.
struct SweepPoint {
  int sms = 0;
  Tuning tuning = {};  ///< zeros: by formula
  Timings kernel = {};
  reference::Report report = {};
  double burst_us = 0, dispatch_burst_us = 0;
};
/// The points of `--sms A,B,...` and `--tune`, and what they took. CUDA only.
std::vector<SweepPoint> sweep(const std::shared_ptr<Communicator>& communicator,
                              const BenchOptions& options);
/// Rank 0 prints them in their order, then how far the formula is from the best, and writes the
/// JSON file. Returns the number of wrong values over all ranks.
std::int64_t report_sweep(Communicator& communicator, const BenchOptions& options,
                          const std::vector<SweepPoint>& points);

/// How the round trip that a bench is checked by uses the API.
reference::RoundTripOptions check_of(const BenchOptions& options);

/// Runs the bench that the options and the communicator's backend ask for.
Measurement measure(const std::shared_ptr<Communicator>& communicator, const BenchOptions& options);
/// Bytes of device memory that a bench of these options takes of the arena.
HighThroughputOptions high_throughput_options(const BenchOptions& options);
std::size_t arena_bytes_for(const BenchOptions& options, int ranks);

Measurement bench_low_latency(const std::shared_ptr<Communicator>& communicator,
                              const BenchOptions& options);
Measurement bench_high_throughput(const std::shared_ptr<Communicator>& communicator,
                                  const BenchOptions& options);

/// The steps of a workload that a bench rotates through: enough that inputs do not stay in caches.
struct Steps {
  std::vector<reference::RankInput> inputs;
  Traffic traffic;
  reference::Skew skew;  ///< over all ranks, first step
};
Steps make_steps(const reference::Workload& workload, int rank);

/// A measurement with what is known before anything runs.
Measurement start_measurement(const Communicator& communicator, const Steps& steps,
                              const BenchOptions& options);

/// The rank that is late with `--late`, of two or more.
inline constexpr int kLateRank = 1;

/// Microseconds since an arbitrary start.
double now_us();

/// Returns so much later; the core is busy meanwhile, as it is with work.
void hold_up(double us);
/// Times a pair of the CPU backend: `run(iteration, late_us, timings)`, as it comes, and, if that
/// was asked for, with one rank late at each operation.
void time_on_host(Communicator& communicator, const BenchOptions& options,
                  const std::function<void(int, double, Timings&)>& run, Measurement& result);

/// Gathers what all ranks measured; rank 0 prints the table and writes the JSON file. Returns the
/// number of wrong values over all ranks.
std::int64_t report(Communicator& communicator, const BenchOptions& options,
                    const Measurement& measurement);

/// Runs the bench as the ranks of a launcher, or launches them. Returns an exit status.
int run_bench(const BenchOptions& options, const std::vector<std::string>& command);

}  // namespace expertwire::tools
