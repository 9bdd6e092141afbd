#include "ep/region.hpp"

#include <algorithm>
#include <array>
#include <vector>

#include "base/check.hpp"

namespace expertwire::ep {

namespace {

struct Field {
  const char* name;
  std::int64_t (*get)(const Agreement&);
};

constexpr std::array kFields = {
    Field{"mode (0 low latency, 1 high throughput)",
          [](const Agreement& a) -> std::int64_t { return a.mode; }},
    Field{"shape.hidden", [](const Agreement& a) -> std::int64_t { return a.hidden; }},
    Field{"shape.experts", [](const Agreement& a) -> std::int64_t { return a.experts; }},
    Field{"shape.top_k", [](const Agreement& a) -> std::int64_t { return a.top_k; }},
    Field{"shape.max_tokens", [](const Agreement& a) -> std::int64_t { return a.max_tokens; }},
    Field{"shape.dtype", [](const Agreement& a) -> std::int64_t { return a.dtype; }},
    Field{"lanes", [](const Agreement& a) -> std::int64_t { return a.lanes; }},
    Field{"EXPERTWIRE_FIRST_EPOCH",
          [](const Agreement& a) -> std::int64_t { return a.first_epoch; }},
    Field{"pool_rows", [](const Agreement& a) -> std::int64_t { return a.pool_rows; }},
};

}  // namespace

Region::Region(const std::shared_ptr<Communicator>& communicator, const Request& request)
    : block_(communicator,
             request.lane_bytes * static_cast<std::uint64_t>(request.agreement.lanes)),
      lane_bytes_(request.lane_bytes) {
  const int rank = communicator->rank();
  for (int l = 0; l < request.agreement.lanes; ++l) {
    auto* words = reinterpret_cast<Epoch*>(lane(rank, l));
    std::fill(words, words + request.flag_bytes / sizeof(Epoch), request.agreement.first_epoch);
  }
  // This gather is also the barrier after which peers may write.
  std::vector<Agreement> agreements(static_cast<std::size_t>(communicator->size()));
  agreements[static_cast<std::size_t>(rank)] = request.agreement;
  communicator->all_gather(agreements.data(), sizeof(Agreement));
  for (std::size_t peer = 0; peer < agreements.size(); ++peer)
    for (const Field& field : kFields)
      check(field.get(agreements[peer]) == field.get(request.agreement), ErrorCode::mismatch,
            "rank {} has {} = {}, rank {} has {}", peer, field.name, field.get(agreements[peer]),
            rank, field.get(request.agreement));
}

}  // namespace expertwire::ep
