#include "ep/front/region.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <vector>

#include "base/check.hpp"
#include "base/env.hpp"
#include "comm/device_words.hpp"

namespace expertwire::inline v0::ep {

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

SlotSizes slot_sizes(const MoeShape& shape, int ranks) {
  SlotSizes sizes;
  sizes.ranks = static_cast<std::uint64_t>(ranks);
  sizes.local_experts = static_cast<std::uint64_t>(shape.experts / ranks);
  sizes.max_tokens = static_cast<std::uint64_t>(shape.max_tokens);
  sizes.top_k = static_cast<std::uint64_t>(shape.top_k);
  sizes.row_bytes = shape.row_bytes();
  sizes.scales = scales_of(shape.hidden);
  return sizes;
}

Agreement agreement_on(int mode, const MoeShape& shape, int lanes) {
  return {mode,        shape.hidden,           shape.experts,
          shape.top_k, shape.max_tokens,       static_cast<std::int32_t>(shape.dtype),
          lanes,       Env::get().first_epoch, 0};
}

Region::Region(const std::shared_ptr<Communicator>& communicator, const Request& request)
    : block_(communicator,
             request.lane_bytes * static_cast<std::uint64_t>(request.agreement.lanes)),
      lane_bytes_(request.lane_bytes) {
  const int rank = communicator->rank();
  std::vector<Epoch> flags(request.flag_bytes / sizeof(Epoch), request.agreement.first_epoch);
  for (std::uint64_t offset : request.counters)
    std::fill_n(&flags[offset / sizeof(Epoch) + 2], 2, 0);  // workers that are done
  std::optional<DeviceWords> device;
  if (communicator->cuda_device() >= 0) device.emplace(communicator->cuda_device());
  for (int l = 0; l < request.agreement.lanes; ++l) {
    if (device)
      device->copy(lane(rank, l), flags.data(), request.flag_bytes);
    else
      std::memcpy(lane(rank, l), flags.data(), request.flag_bytes);
  }
  if (device) device->flush(Deadline::after(communicator->timeout()));
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
