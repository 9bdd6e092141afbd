#include "comm/rank_pairs.hpp"

#include <algorithm>
#include <charconv>

#include "base/check.hpp"

namespace expertwire::inline v0 {

namespace {

/// Reads a rank at the start of `text` and takes it away; -1 if there is none.
int take_rank(std::string_view& text) {
  int rank = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), rank);
  if (error != std::errc()) return -1;
  text.remove_prefix(static_cast<std::size_t>(end - text.data()));
  return rank;
}

bool take(std::string_view& text, char wanted) {
  const bool found = !text.empty() && text.front() == wanted;
  if (found) text.remove_prefix(1);
  return found;
}

}  // namespace

RankPairs::RankPairs(std::string_view setting, std::string_view text, int ranks) {
  if (text.empty() || text == "none") return;
  all_ = text == "all";
  std::string_view rest = all_ ? "" : text;
  while (!rest.empty()) {
    const int a = take_rank(rest);
    const bool joined = take(rest, '-');
    const int b = joined ? take_rank(rest) : -1;
    const bool separated = rest.empty() || (take(rest, ',') && !rest.empty());
    check_argument(a >= 0 && b >= 0 && a < ranks && b < ranks && a != b && separated,
                   "{} is '{}'; it must be none, all, or pairs of two different ranks below {}, "
                   "such as 0-1,2-3",
                   setting, text, ranks);
    pairs_.push_back(std::minmax({a, b}));
  }
}

bool RankPairs::has(int a, int b) const {
  const std::pair<int, int> pair = std::minmax({a, b});
  return all_ || std::find(pairs_.begin(), pairs_.end(), pair) != pairs_.end();
}

}  // namespace expertwire
