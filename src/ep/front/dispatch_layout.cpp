#include "expertwire/dispatch_layout.hpp"

#include "base/check.hpp"
#include "ep/front/route.hpp"
#include "ep/front/validate.hpp"

namespace expertwire::inline v0 {

DispatchLayout dispatch_layout(const DispatchLayoutRequest& request) {
  ep::check_expert_count(request.experts, request.ranks);
  ep::check_topk_idx(request.topk_idx);
  check_argument(request.topk_idx.size(0) <= INT32_MAX && request.topk_idx.size(1) <= INT16_MAX,
                 "topk_idx is {}; that is more than can be counted", describe(request.topk_idx));
  if (request.topology != nullptr)
    check_argument(request.topology->size() == request.ranks,
                   "topology has {} ranks and ranks is {}; they must be equal",
                   request.topology->size(), request.ranks);
  const ep::Placement placement{request.ranks, request.experts};
  const auto tokens = static_cast<int>(request.topk_idx.size(0));
  const ep::Route route =
      ep::make_route({request.topk_idx.data(), request.topk_idx.dtype() == DType::int64}, tokens,
                     static_cast<int>(request.topk_idx.size(1)), placement);

  DispatchLayout layout;
  layout.tokens_per_rank = route.rows_to_rank;
  layout.tokens_per_expert = route.rows_to_expert;
  layout.invalid_ids = route.invalid_ids;
  const auto ranks = static_cast<std::size_t>(request.ranks);
  const int nodes = request.topology != nullptr ? request.topology->nodes() : 1;
  layout.tokens_per_node.assign(static_cast<std::size_t>(nodes), 0);
  layout.is_token_in_rank.assign(static_cast<std::size_t>(tokens) * ranks, 0);
  std::vector<int> last_token(static_cast<std::size_t>(nodes), -1);
  for (int t = 0; t < tokens; ++t) {
    const ep::Destination* list = route.destinations_of(t);
    for (int i = 0; i < route.width() && list[i].rank >= 0; ++i) {
      layout.is_token_in_rank[static_cast<std::size_t>(t) * ranks +
                              static_cast<std::size_t>(list[i].rank)] = 1;
      const auto node = static_cast<std::size_t>(
          request.topology != nullptr ? request.topology->node_of(list[i].rank) : 0);
      if (last_token[node] != t) ++layout.tokens_per_node[node];
      last_token[node] = t;
    }
  }
  return layout;
}

}  // namespace expertwire
