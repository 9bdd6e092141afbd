#include <fmt/format.h>

#include <algorithm>
#include <fstream>

#include "bench.hpp"
#include "bench_lines.hpp"

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

struct Verified {
  double checked, wrong;
};

void write(const BenchOptions& options, const Communicator& communicator,
           const std::vector<Row>& rows, const Verified& verified) {
  nlohmann::json points = nlohmann::json::array();
  for (const Row& row : rows)
    points.push_back({{"sms", row.sms},
                      {"sender_warps", row.tuning.sender_warps},
                      {"ring_bytes", row.tuning.ring_bytes},
                      {"dispatch", to_json(row.dispatch)},
                      {"combine", to_json(row.combine)},
                      {"dispatch_burst_us", row.dispatch_burst_us},
                      {"burst_us", row.burst_us}});
  const nlohmann::json result = {
      {"mode", options.high_throughput ? "ht" : "ll"},
      {"banner", communicator.banner()},
      {"ranks", communicator.size()},
      {"model", options.model},
      {"shape",
       {{"hidden", options.shape.hidden},
        {"experts", options.shape.experts},
        {"top_k", options.shape.top_k},
        {"tokens", options.shape.max_tokens},
        {"dtype", std::string(to_string(options.shape.dtype))}}},
      {"output", options.output == HighThroughput::Output::pool ? "pool" : "owned"},
      {"routing", options.routing},
      {"iterations", options.iterations},
      {"verified", options.verify},
      {"checked", verified.checked},
      {"wrong", verified.wrong},
      {"fp8", options.fp8},
      {"seed", options.seed},
      {"points", points}};
  std::ofstream file(options.json);
  file << result.dump(2) << "\n";
  if (!file) fmt::print(stderr, "expertwire: cannot write {}\n", options.json);
}

}  // namespace

std::int64_t report_sweep(Communicator& communicator, const BenchOptions& options,
                          const std::vector<SweepPoint>& points) {
  const std::vector<Row> rows = over_ranks(communicator, points);
  reference::Report mine;
  for (const SweepPoint& point : points) mine += point.report;
  if (mine.wrong > 0) fmt::print(stderr, "wrong: {}\n", mine.first_wrong);
  double checked = 0, wrong = 0;
  for (const auto& rank :
       gather(communicator, {static_cast<double>(mine.checked), static_cast<double>(mine.wrong)})) {
    checked += rank[0];
    wrong += rank[1];
  }
  if (communicator.rank() != 0) return static_cast<std::int64_t>(wrong);
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
  if (options.verify)
    fmt::print("# verified {:.0f} values: {:.0f} wrong\n", checked, wrong);
  else
    fmt::print("# not verified (--no-verify)\n");
  if (!options.json.empty()) write(options, communicator, rows, {checked, wrong});
  return static_cast<std::int64_t>(wrong);
}

}  // namespace expertwire::tools
