#include "reference/routing_pattern.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <stdexcept>

namespace expertwire::reference {

namespace {

constexpr const char* kAllowed =
    "uniform, balanced, lognormal:S, powerlaw:A, zipf:S, hotrank:P, grouped:N,K, masked:P, "
    "trace:FILE";

/// One token a line: K whole numbers, or the JSON lines of Megatron's routing traces, whose
/// "top_indices" hold a list a token.
std::vector<std::vector<std::int64_t>> read_trace(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::invalid_argument("cannot read the routing trace " + path);
  std::vector<std::vector<std::int64_t>> tokens;
  for (std::string line; std::getline(file, line);) {
    if (line.empty() || line.front() == '#') continue;
    if (line.front() == '{') {
      const auto record = nlohmann::json::parse(line);
      for (const auto& row : record.at("top_indices"))
        tokens.push_back(row.get<std::vector<std::int64_t>>());
      continue;
    }
    std::istringstream words(line);
    std::vector<std::int64_t>& row = tokens.emplace_back();
    for (std::int64_t id = 0; words >> id;) row.push_back(id);
  }
  if (tokens.empty()) throw std::invalid_argument("the routing trace " + path + " has no tokens");
  return tokens;
}

/// K distinct experts, each chosen with a chance proportional to its weight: the K smallest of
/// exponential draws with those rates.
std::vector<std::int64_t> draw_distinct(const std::vector<double>& weights, int top_k,
                                        Random& random) {
  std::vector<std::pair<double, std::int64_t>> race;
  for (std::size_t e = 0; e < weights.size(); ++e)
    if (weights[e] > 0)
      race.emplace_back(-std::log1p(-random.uniform()) / weights[e], static_cast<std::int64_t>(e));
  const auto count = std::min<std::size_t>(static_cast<std::size_t>(top_k), race.size());
  std::partial_sort(race.begin(), race.begin() + static_cast<std::ptrdiff_t>(count), race.end());
  std::vector<std::int64_t> chosen(static_cast<std::size_t>(top_k), -1);
  for (std::size_t k = 0; k < count; ++k) chosen[k] = race[k].second;
  return chosen;
}

double gaussian(Random& random) {
  return std::sqrt(-2 * std::log1p(-random.uniform())) * std::cos(2 * M_PI * random.uniform());
}

}  // namespace

RoutingPattern RoutingPattern::parse(const std::string& text) {
  static const std::array<std::pair<const char*, int>, 9> kNames = {{{"uniform", 0},
                                                                     {"balanced", 0},
                                                                     {"lognormal", 1},
                                                                     {"powerlaw", 1},
                                                                     {"zipf", 1},
                                                                     {"hotrank", 1},
                                                                     {"grouped", 2},
                                                                     {"masked", 1},
                                                                     {"trace", -1}}};
  const std::size_t colon = text.find(':');
  const std::string name = text.substr(0, colon);
  const std::string rest = colon == std::string::npos ? "" : text.substr(colon + 1);
  for (std::size_t i = 0; i < kNames.size(); ++i) {
    if (name != kNames[i].first) continue;
    RoutingPattern pattern;
    pattern.kind_ = static_cast<Kind>(i);
    pattern.text_ = text;
    if (pattern.kind_ == Kind::trace) {
      pattern.trace_ = read_trace(rest);
      return pattern;
    }
    char comma = 0;
    std::istringstream numbers(rest);
    int found = 0;
    if (numbers >> pattern.a_) ++found;
    if (found == 1 && numbers >> comma >> pattern.b_ && comma == ',') ++found;
    if (found == kNames[i].second) return pattern;
  }
  throw std::invalid_argument(
      fmt::format("routing pattern '{}' must be one of {}", text, kAllowed));
}

std::vector<double> RoutingPattern::popularity(const Shape& shape) const {
  const auto experts = static_cast<std::size_t>(shape.experts);
  std::vector<double> weights(experts, 1.0);
  Random random{shape.seed, 77};
  for (std::size_t e = 0; e < experts; ++e) {
    if (kind_ == Kind::lognormal) weights[e] = std::exp(a_ * gaussian(random));
    if (kind_ == Kind::zipf) weights[e] = std::pow(static_cast<double>(e + 1), -a_);
    if (kind_ == Kind::powerlaw) {
      // Inverse transform of x^-a on [1, 3277]: the draw that aiconfigurator uses for 4096 tokens.
      const double high = std::pow(0.8 * 4096, 1 - a_);
      weights[e] = std::pow((high - 1) * random.uniform() + 1, 1 / (1 - a_));
    }
  }
  for (std::size_t e = experts; e > 1; --e)
    std::swap(weights[e - 1], weights[static_cast<std::size_t>(random.below(static_cast<int>(e)))]);
  return weights;
}

std::vector<std::int64_t> RoutingPattern::draw(const Shape& shape,
                                               const std::vector<double>& popularity,
                                               std::int64_t token_of_job, Random& random) const {
  const auto top_k = static_cast<std::size_t>(shape.top_k);
  const int local = shape.experts / shape.ranks;
  switch (kind_) {
    case Kind::trace: {
      std::vector<std::int64_t> row =
          trace_[static_cast<std::size_t>(token_of_job) % trace_.size()];
      row.resize(top_k, -1);
      for (std::int64_t& id : row)
        if (id >= shape.experts) id = -1;
      return row;
    }
    case Kind::balanced: {
      std::vector<std::int64_t> row(top_k);
      for (std::size_t k = 0; k < top_k; ++k)
        row[k] = (token_of_job * shape.top_k + static_cast<std::int64_t>(k)) % shape.experts;
      return row;
    }
    case Kind::hotrank: {
      std::vector<double> weights = popularity;
      if (random.chance(a_)) std::fill(weights.begin() + local, weights.end(), 0.0);
      return draw_distinct(weights, shape.top_k, random);
    }
    case Kind::grouped: {
      const int groups = std::clamp(static_cast<int>(a_), 1, shape.experts);
      std::vector<double> chosen(static_cast<std::size_t>(groups), 1.0);
      const auto kept = draw_distinct(chosen, std::min(static_cast<int>(b_), groups), random);
      std::vector<double> weights(popularity.size(), 0.0);
      for (std::size_t e = 0; e < weights.size(); ++e)
        for (std::int64_t group : kept)
          if (static_cast<std::int64_t>(e) * groups / shape.experts == group)
            weights[e] = popularity[e];
      return draw_distinct(weights, shape.top_k, random);
    }
    case Kind::masked: {
      std::vector<std::int64_t> row = draw_distinct(popularity, shape.top_k, random);
      for (std::int64_t& id : row)
        if (random.chance(a_)) id = -1;
      return row;
    }
    default:
      return draw_distinct(popularity, shape.top_k, random);
  }
}

Skew measure_skew(const std::vector<std::int64_t>& selections, int experts, int ranks) {
  std::vector<double> per_expert(static_cast<std::size_t>(experts), 0),
      per_rank(static_cast<std::size_t>(ranks), 0);
  double total = 0;
  for (std::int64_t id : selections) {
    if (id < 0 || id >= experts) continue;
    ++per_expert[static_cast<std::size_t>(id)];
    ++per_rank[static_cast<std::size_t>(id * ranks / experts)];
    ++total;
  }
  if (total == 0) return {};
  return {*std::max_element(per_expert.begin(), per_expert.end()) * experts / total,
          *std::max_element(per_rank.begin(), per_rank.end()) * ranks / total};
}

}  // namespace expertwire::reference
