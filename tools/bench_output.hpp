#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench.hpp"

namespace expertwire::tools {

/// Every rank's values: element [rank][i].
using PerRank = std::vector<std::vector<double>>;
PerRank gather(Communicator& communicator, const std::vector<double>& mine);

enum class Operation { dispatch, combine, pair };

/// One operation over iterations (the slowest rank of each) and over ranks (means).
struct Line {
  std::string name;
  Operation operation;
  double mean_us, p50, p99, min, max;
  double rank_avg, rank_min, rank_max;
};
/// `how` it was timed is the beginning of the line's name.
Line summarize(const std::string& how, Operation operation, const PerRank& times);
nlohmann::json to_json(const Line& line);

/// Values that all ranks compared.
struct Verified {
  double checked, wrong;
};
/// Adds up what ranks found, and says what was wrong first. Collective.
Verified gather_verified(Communicator& communicator, const reference::Report& mine);
void print_verified(const BenchOptions& options, const Verified& verified);

/// What was run, for the beginning of a JSON file.
nlohmann::json describe_run(const Communicator& communicator, const BenchOptions& options,
                            const Verified& verified);
/// Writes the file that `--json` names, if it does.
void write_json(const BenchOptions& options, const nlohmann::json& result);

}  // namespace expertwire::tools
