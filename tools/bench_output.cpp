#include "bench_output.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <numeric>

#include "expertwire/version.hpp"

namespace expertwire::tools {

namespace {

double mean(const std::vector<double>& values) {
  return values.empty() ? 0
                        : std::accumulate(values.begin(), values.end(), 0.0) /
                              static_cast<double>(values.size());
}

double quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[static_cast<std::size_t>(std::lround(q * static_cast<double>(values.size() - 1)))];
}

}  // namespace

PerRank gather(Communicator& communicator, const std::vector<double>& mine) {
  const auto ranks = static_cast<std::size_t>(communicator.size());
  std::vector<double> all(mine.size() * ranks);
  std::copy(mine.begin(), mine.end(),
            all.begin() + static_cast<std::ptrdiff_t>(
                              mine.size() * static_cast<std::size_t>(communicator.rank())));
  communicator.all_gather(all.data(), mine.size() * sizeof(double));
  PerRank split;
  for (std::size_t r = 0; r < ranks; ++r)
    split.emplace_back(all.begin() + static_cast<std::ptrdiff_t>(r * mine.size()),
                       all.begin() + static_cast<std::ptrdiff_t>((r + 1) * mine.size()));
  return split;
}

Line summarize(const std::string& how, Operation operation, const PerRank& times) {
  static constexpr const char* kNames[] = {"dispatch", "combine", "pair"};
  std::vector<double> slowest(times.front().size(), 0), means;
  for (const auto& rank : times) {
    for (std::size_t i = 0; i < rank.size(); ++i) slowest[i] = std::max(slowest[i], rank[i]);
    means.push_back(mean(rank));
  }
  return {how + (how.empty() ? "" : " ") + kNames[static_cast<int>(operation)],
          operation,
          mean(slowest),
          quantile(slowest, 0.5),
          quantile(slowest, 0.99),
          quantile(slowest, 0),
          quantile(slowest, 1),
          mean(means),
          *std::min_element(means.begin(), means.end()),
          *std::max_element(means.begin(), means.end())};
}

nlohmann::json to_json(const Line& line) {
  return {{"mean_us", line.mean_us},
          {"p50_us", line.p50},
          {"p99_us", line.p99},
          {"min_us", line.min},
          {"max_us", line.max},
          {"over_ranks",
           {{"avg_us", line.rank_avg}, {"min_us", line.rank_min}, {"max_us", line.rank_max}}}};
}

Verified gather_verified(Communicator& communicator, const reference::Report& mine) {
  if (mine.wrong > 0) fmt::print(stderr, "wrong: {}\n", mine.first_wrong);
  Verified all{};
  for (const auto& rank :
       gather(communicator, {static_cast<double>(mine.checked), static_cast<double>(mine.wrong)})) {
    all.checked += rank[0];
    all.wrong += rank[1];
  }
  return all;
}

void print_verified(const BenchOptions& options, const Verified& verified) {
  if (options.verify)
    fmt::print("# verified {:.0f} values: {:.0f} wrong\n", verified.checked, verified.wrong);
  else
    fmt::print("# not verified (--no-verify)\n");
}

nlohmann::json describe_run(const Communicator& communicator, const BenchOptions& options,
                            const Verified& verified) {
  const MoeShape& shape = options.shape;
  return {{"version", kVersion},
          {"mode", options.high_throughput ? "ht" : "ll"},
          {"banner", communicator.banner()},
          {"ranks", communicator.size()},
          {"lanes", options.lanes},
          {"model", options.model},
          {"shape",
           {{"hidden", shape.hidden},
            {"experts", shape.experts},
            {"top_k", shape.top_k},
            {"tokens", shape.max_tokens},
            {"dtype", std::string(to_string(shape.dtype))}}},
          {"output", options.output == HighThroughput::Output::pool ? "pool" : "owned"},
          {"layout", options.grouped() ? "expert-major" : "token-major"},
          {"alignment", options.alignment},
          {"fp8", options.fp8},
          {"routing", options.routing},
          {"seed", options.seed},
          {"iterations", options.iterations},
          {"verified", options.verify},
          {"checked", verified.checked},
          {"wrong", verified.wrong}};
}

void write_json(const BenchOptions& options, const nlohmann::json& result) {
  if (options.json.empty()) return;
  std::ofstream file(options.json);
  file << result.dump(2) << "\n";
  if (!file) fmt::print(stderr, "expertwire: cannot write {}\n", options.json);
}

}  // namespace expertwire::tools
