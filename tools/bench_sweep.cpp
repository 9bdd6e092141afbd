#include <fmt/format.h>

#include <algorithm>

#include "bench.hpp"
#include "bench_output.hpp"

namespace expertwire::tools {

namespace {

/// A point over all ranks.
struct Row {
  int sms;
  Tuning tuning;
  Line dispatch, combine;
  double dispatch_burst_us, burst_us;

  bool by_formula() const { return tuning.sender_warps == 0 && tuning.ring_bytes == 0; }
  double pair_us() const { return dispatch.p50 + combine.p50; }
};

double slowest(Communicator& communicator, double mine) {
  double most = 0;
  for (const auto& rank : gather(communicator, {mine})) most = std::max(most, rank.front());
  return most;
}

std::vector<Row> over_ranks(Communicator& communicator, const std::vector<SweepPoint>& points) {
  std::vector<Row> rows;
  for (const SweepPoint& point : points)
    rows.push_back({point.sms, point.tuning,
                    summarize("", Operation::dispatch, gather(communicator, point.kernel.dispatch)),
                    summarize("", Operation::combine, gather(communicator, point.kernel.combine)),
                    slowest(communicator, point.dispatch_burst_us),
                    slowest(communicator, point.burst_us)});
  return rows;
}

std::string describe(const Tuning& tuning) {
  return tuning.sender_warps == 0
             ? "by formula"
             : fmt::format("{:>2} warps, {:>6} B", tuning.sender_warps, tuning.ring_bytes);
}

/// For the SM counts of which several points were tried: how far the first is from the best.
void print_formula_against_best(const std::vector<Row>& rows, bool high_throughput) {
  if (!high_throughput) {
    const auto best = std::min_element(rows.begin(), rows.end(), [](const Row& a, const Row& b) {
      return a.pair_us() < b.pair_us();
    });
    fmt::print(
        "# all {} SMs of a rank, as by default: pair {:.1f} us; best {:.1f} us with {}: {:.1f}% "
        "more\n",
        rows.front().sms, rows.front().pair_us(), best->pair_us(), best->sms,
        100 * (rows.front().pair_us() / best->pair_us() - 1));
    return;
  }
  for (const Row& formula : rows) {
    if (!formula.by_formula()) continue;
    const Row* best = &formula;
    for (const Row& row : rows)
      if (row.sms == formula.sms && row.dispatch.p50 < best->dispatch.p50) best = &row;
    fmt::print("# {} SMs: dispatch by formula {:.1f} us; best {:.1f} us with {}: {:.1f}% more\n",
               formula.sms, formula.dispatch.p50, best->dispatch.p50, describe(best->tuning),
               100 * (formula.dispatch.p50 / best->dispatch.p50 - 1));
  }
}

nlohmann::json to_json(const Row& row) {
  return {{"sms", row.sms},
          {"sender_warps", row.tuning.sender_warps},
          {"ring_bytes", row.tuning.ring_bytes},
          {"dispatch", tools::to_json(row.dispatch)},
          {"combine", tools::to_json(row.combine)},
          {"dispatch_burst_us", row.dispatch_burst_us},
          {"burst_us", row.burst_us}};
}

}  // namespace

std::int64_t report_sweep(Communicator& communicator, const BenchOptions& options,
                          const std::vector<SweepPoint>& points) {
  const std::vector<Row> rows = over_ranks(communicator, points);
  reference::Report mine;
  for (const SweepPoint& point : points) mine += point.report;
  const Verified verified = gather_verified(communicator, mine);
  if (communicator.rank() != 0) return static_cast<std::int64_t>(verified.wrong);
  fmt::print(
      "# {}\n# {}: kernel us (p50, slowest rank) and the share of the burst of as many SMs\n",
      communicator.banner(), options.high_throughput ? "ht" : "ll");
  fmt::print("{:>4} {:<20} {:>9} {:>8} {:>9} | {:>9} {:>8} {:>9}\n", "SMs", "", "dispatch", "burst",
             "of burst", "combine", "burst", "of burst");
  for (const Row& row : rows)
    fmt::print("{:>4} {:<20} {:>9.1f} {:>8.1f} {:>8.0f}% | {:>9.1f} {:>8.1f} {:>8.0f}%\n", row.sms,
               options.tune && options.high_throughput ? describe(row.tuning) : "",
               row.dispatch.p50, row.dispatch_burst_us,
               100 * row.dispatch_burst_us / row.dispatch.p50, row.combine.p50, row.burst_us,
               100 * row.burst_us / row.combine.p50);
  if (options.tune) print_formula_against_best(rows, options.high_throughput);
  print_verified(options, verified);
  nlohmann::json result = describe_run(communicator, options, verified);
  for (const Row& row : rows) result["points"].push_back(to_json(row));
  write_json(options, result);
  return static_cast<std::int64_t>(verified.wrong);
}

}  // namespace expertwire::tools
