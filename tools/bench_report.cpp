#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "bench.hpp"
#include "bench_output.hpp"

namespace expertwire::tools {

namespace {

using nlohmann::json;

std::vector<Line> summarize_pair(Communicator& communicator, const Timings& timings,
                                 const std::string& how) {
  std::vector<double> pair(timings.dispatch.size());
  for (std::size_t i = 0; i < pair.size(); ++i) pair[i] = timings.dispatch[i] + timings.combine[i];
  std::vector<Line> lines{
      summarize(how, Operation::dispatch, gather(communicator, timings.dispatch)),
      summarize(how, Operation::combine, gather(communicator, timings.combine)),
      summarize(how, Operation::pair, gather(communicator, pair))};
  return lines;
}

/// What an operation takes the other ranks when one is late, beside the delay and its usual time.
struct Lateness {
  Line line;
  double usual_us;  ///< delay and p50 of the operation when nobody is late
  double ratio() const { return line.p50 / usual_us; }
};

/// `usual` has a line for dispatch and one for combine, timed as those of the late runs were.
std::vector<Lateness> summarize_late(Communicator& communicator, const BenchOptions& options,
                                     const Measurement& m, const Line* usual) {
  std::vector<Lateness> all;
  if (m.late.dispatch.empty()) return all;
  for (const Operation operation : {Operation::dispatch, Operation::combine}) {
    const bool dispatch = operation == Operation::dispatch;
    PerRank times = gather(communicator, dispatch ? m.late.dispatch : m.late.combine);
    times.erase(times.begin() + kLateRank);
    all.push_back(
        {summarize("late", operation, times), options.late_us + usual[dispatch ? 0 : 1].p50});
  }
  return all;
}

struct Totals {
  double selections, unique, wire, memcpy_us, burst_us, dispatch_burst_us;
  double dispatch_row, combine_row;  ///< bytes

  /// What a line's operation has to move, and how long that takes at least.
  struct Floor {
    double bytes, us;
  };
  Floor floor_of(Operation operation) const {
    const double rows = burst_us > 0 ? wire : unique;
    const Floor dispatch{rows * dispatch_row,
                         burst_us > 0 ? dispatch_burst_us : memcpy_us * dispatch_row / combine_row};
    const Floor combine{rows * combine_row, burst_us > 0 ? burst_us : memcpy_us};
    if (operation == Operation::dispatch) return dispatch;
    if (operation == Operation::combine) return combine;
    return {dispatch.bytes + combine.bytes, dispatch.us + combine.us};
  }
};

void print_header(const Communicator& communicator, const BenchOptions& options,
                  const Measurement& m) {
  const MoeShape& s = options.shape;
  fmt::print("# {}\n", communicator.banner());
  const std::string workers =
      m.sms > 0 ? fmt::format("{} SMs", m.sms)
                : fmt::format("{} thread{}", m.threads, m.threads == 1 ? "" : "s");
  fmt::print("# bench {}: {} H {} E {} K {} T {} {}{}, {} a rank, {} lane{}{}, seed {}\n",
             options.high_throughput ? "ht" : "ll", options.model, s.hidden, s.experts, s.top_k,
             s.max_tokens, to_string(s.dtype), options.fp8 ? " (fp8 at dispatch)" : "", workers,
             options.lanes, options.lanes == 1 ? "" : "s",
             !options.high_throughput                         ? ""
             : options.grouped()                              ? ", expert-major output"
             : options.output == HighThroughput::Output::pool ? ", pool output"
                                                              : ", owned output",
             options.seed);
  fmt::print("# routing {}: busiest expert {:.2f} x mean, busiest rank {:.2f} x mean\n",
             options.routing, m.skew.expert_max_over_mean, m.skew.rank_max_over_mean);
  fmt::print("# arena {:.1f} MB a rank", static_cast<double>(m.arena_bytes) / 1e6);
  if (m.staged_bytes > 0)
    fmt::print(", and {:.1f} MB of host memory", static_cast<double>(m.staged_bytes) / 1e6);
  fmt::print("\n");
}

/// The last two columns: on the CPU unique bytes beside memcpy; on CUDA wire bytes beside the
/// burst.
void print_lines(const std::vector<Line>& lines, const Totals& totals) {
  const bool cuda = totals.burst_us > 0;
  fmt::print("{:<17} {:>9} {:>9} {:>9} {:>9} {:>9} | {:>9} {:>9} {:>9} | {:>9} {:>8}\n", "us",
             "mean", "p50", "p99", "min", "max", "rank avg", "min", "max",
             cuda ? "wire GB/s" : "uniq GB/s", cuda ? "of burst" : "of memcpy");
  for (const Line& line : lines) {
    const Totals::Floor floor = totals.floor_of(line.operation);
    fmt::print(
        "{:<17} {:>9.1f} {:>9.1f} {:>9.1f} {:>9.1f} {:>9.1f} | {:>9.1f} {:>9.1f} {:>9.1f} "
        "| {:>9.2f} {:>8.0f}%\n",
        line.name, line.mean_us, line.p50, line.p99, line.min, line.max, line.rank_avg,
        line.rank_min, line.rank_max, floor.bytes / line.p50 / 1e3, 100 * floor.us / line.p50);
  }
}

/// All that was timed, as lines.
std::vector<Line> summarize_all(Communicator& communicator, const Measurement& m) {
  const bool cuda = communicator.cuda_device() >= 0;
  std::vector<Line> lines = summarize_pair(communicator, m.timings, cuda ? "host" : "");
  if (!m.stream.dispatch.empty()) {
    const auto stream = summarize_pair(communicator, m.stream, "stream");
    lines.insert(lines.end(), stream.begin(), stream.end());
  }
  if (!m.kernel.dispatch.empty()) {
    const auto kernel = summarize_pair(communicator, m.kernel, "kernel");
    lines.insert(lines.end(), kernel.begin(), kernel.end());
  }
  if (!m.graph_pair.empty())
    lines.push_back(summarize("graph", Operation::pair, gather(communicator, m.graph_pair)));
  return lines;
}

void print_traffic(const Totals& totals) {
  const double row_bytes = totals.combine_row;
  fmt::print("# MB a rank: selections {:.2f}, unique {:.2f}, wire {:.2f}; ",
             totals.selections * row_bytes / 1e6, totals.unique * row_bytes / 1e6,
             totals.wire * row_bytes / 1e6);
  if (totals.burst_us > 0)
    fmt::print("wire bytes stored in one burst: {:.1f} us, {:.1f} GB/s (slowest rank)\n",
               totals.burst_us, totals.wire * row_bytes / totals.burst_us / 1e3);
  else
    fmt::print("memcpy of unique: {:.1f} us, {:.2f} GB/s (slowest rank, all at once)\n",
               totals.memcpy_us, totals.unique * row_bytes / totals.memcpy_us / 1e3);
}

}  // namespace

std::int64_t report(Communicator& communicator, const BenchOptions& options, const Measurement& m) {
  const auto row_bytes = static_cast<double>(options.shape.row_bytes());
  const PerRank numbers =
      gather(communicator, {m.traffic.selections, m.traffic.unique, m.traffic.wire, m.memcpy_us,
                            m.burst_us, m.dispatch_burst_us});
  Totals totals{};
  totals.dispatch_row = static_cast<double>(options.dispatch_row_bytes());
  totals.combine_row = row_bytes;
  const auto ranks = static_cast<double>(communicator.size());
  for (const auto& rank : numbers) {
    totals.selections += rank[0] / ranks;
    totals.unique += rank[1] / ranks;
    totals.wire += rank[2] / ranks;
    totals.memcpy_us = std::max(totals.memcpy_us, rank[3]);
    totals.burst_us = std::max(totals.burst_us, rank[4]);
    totals.dispatch_burst_us = std::max(totals.dispatch_burst_us, rank[5]);
  }
  const std::vector<Line> lines = summarize_all(communicator, m);
  // Late operations are timed as the first lines are on the CPU, and by their kernels on CUDA.
  const Line* usual = lines.data() + (communicator.cuda_device() >= 0 ? 6 : 0);
  const std::vector<Lateness> late = summarize_late(communicator, options, m, usual);
  std::vector<Line> peers;
  for (const Peer& peer : m.peers) {
    const auto three = summarize_pair(communicator, peer.timings, peer.name);
    peers.insert(peers.end(), three.begin(), three.end());
  }
  const Verified verified = gather_verified(communicator, m.report);
  if (communicator.rank() != 0) return static_cast<std::int64_t>(verified.wrong);

  print_header(communicator, options, m);
  print_traffic(totals);
  std::vector<Line> all = lines;
  all.insert(all.end(), peers.begin(), peers.end());
  print_lines(all, totals);
  if (!m.peers.empty() && !m.peers.front().version.empty())
    fmt::print("# {} is version {}\n", options.peer, m.peers.front().version);
  for (const std::string& line : m.moments) fmt::print("# {}\n", line);
  for (const Lateness& l : late)
    fmt::print(
        "# {} (rank {} by {:.0f} us): others p50 {:.1f} us, {:.3f} x the delay and the usual\n",
        l.line.name, kLateRank, options.late_us, l.line.p50, l.ratio());
  // Peers are timed as the first three lines are on the CPU, and as the next three are on CUDA.
  const std::size_t ours = communicator.cuda_device() >= 0 ? 3 : 0;
  for (std::size_t i = 0; i < peers.size(); ++i) {
    const Line& line = lines[ours + i % 3];
    fmt::print("# {} takes {:.2f} x as long as {} (p50)\n", peers[i].name, peers[i].p50 / line.p50,
               line.name);
  }
  print_verified(options, verified);

  json result = describe_run(communicator, options, verified);
  result.update({{"threads", m.threads},
                 {"skew",
                  {{"expert_max_over_mean", m.skew.expert_max_over_mean},
                   {"rank_max_over_mean", m.skew.rank_max_over_mean}}},
                 {"arena_bytes", m.arena_bytes},
                 {"staged_bytes", m.staged_bytes},
                 {"bytes_per_rank",
                  {{"selections", totals.selections * row_bytes},
                   {"unique", totals.unique * row_bytes},
                   {"wire", totals.wire * row_bytes}}},
                 {"memcpy_us", totals.memcpy_us},
                 {"sms", m.sms},
                 {"dispatch_row_bytes", totals.dispatch_row},
                 {"burst_us", totals.burst_us},
                 {"dispatch_burst_us", totals.dispatch_burst_us},
                 {"moments", m.moments},
                 {"peer_version", m.peers.empty() ? "" : m.peers.front().version}});
  const char* times = communicator.cuda_device() >= 0 ? "times" : "host";
  for (const Line& line : all) result[times][line.name] = to_json(line);
  for (const Lateness& l : late) {
    json line = to_json(l.line);
    line.update({{"late_us", options.late_us}, {"over_delay_and_usual", l.ratio()}});
    result["late"][l.line.name] = line;
  }
  write_json(options, result);
  return static_cast<std::int64_t>(verified.wrong);
}

}  // namespace expertwire::tools
