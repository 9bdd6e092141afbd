#pragma once

#include <string_view>
#include <utility>
#include <vector>

namespace expertwire::inline v0 {

/// Pairs of ranks that are to be reached by another way than the first that there is, as users name
/// them: `none`, `all`, or a list such as `0-1,2-3`.
class RankPairs {
 public:
  /// Throws `Error{invalid_argument}` that says what is allowed; `setting` is who names them.
  RankPairs(std::string_view setting, std::string_view text, int ranks);

  bool has(int a, int b) const;

 private:
  bool all_ = false;
  std::vector<std::pair<int, int>> pairs_;
};

}  // namespace expertwire
