#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "expertwire/communicator.hpp"

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

}  // namespace expertwire::tools
