#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "expertwire/communicator.hpp"

namespace expertwire::tools {

/// Every rank's values: element [rank][i].
using PerRank = std::vector<std::vector<double>>;
PerRank gather(Communicator& communicator, const std::vector<double>& mine);

/// One operation over iterations (the slowest rank of each) and over ranks (means).
struct Line {
  std::string name;
  double mean_us, p50, p99, min, max;
  double rank_avg, rank_min, rank_max;
};
Line summarize(const std::string& name, const PerRank& times);
nlohmann::json to_json(const Line& line);

}  // namespace expertwire::tools
