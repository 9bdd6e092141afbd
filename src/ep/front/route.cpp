#include "ep/front/route.hpp"

namespace expertwire::inline v0::ep {

Route make_route(const ExpertIds& ids, int tokens, int top_k, const Placement& placement) {
  Route route;
  route.placement = placement;
  route.tokens = tokens;
  route.top_k = top_k;
  const auto count = static_cast<std::size_t>(tokens);
  const auto k_count = static_cast<std::size_t>(top_k);
  const auto width = static_cast<std::size_t>(route.width());
  route.experts.resize(count * k_count);
  route.positions.assign(count * k_count, -1);
  route.destinations.assign(count * width, {-1, -1});
  route.rows_to_rank.assign(static_cast<std::size_t>(placement.ranks), 0);
  route.rows_to_expert.assign(static_cast<std::size_t>(placement.experts), 0);
  std::vector<std::int32_t> last_token(static_cast<std::size_t>(placement.ranks), -1);

  for (std::size_t t = 0; t < count; ++t) {
    std::int32_t* experts = &route.experts[t * k_count];
    for (std::size_t k = 0; k < k_count; ++k) {
      const auto i = static_cast<std::int64_t>(t * k_count + k);
      bool valid = true;
      experts[k] = ids.at(i, placement.experts, &valid);
      if (!valid && route.invalid_ids++ == 0) route.first_invalid = i;
      if (experts[k] >= 0)
        route.positions[t * k_count + k] =
            route.rows_to_expert[static_cast<std::size_t>(experts[k])]++;
    }
    Destination* list = &route.destinations[t * width];
    int found = 0;
    for_each_rank(experts, top_k, placement, static_cast<std::int32_t>(t), last_token.data(),
                  [&](int, std::int32_t rank) {
                    list[found++] = {rank, route.rows_to_rank[static_cast<std::size_t>(rank)]++};
                  });
    sort_by_rank(list, found);
  }
  return route;
}

}  // namespace expertwire::ep
