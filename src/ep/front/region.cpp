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
    Field{"ring_frames", [](const Agreement& a) -> std::int64_t { return a.ring_frames; }},
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
  return {mode,
          shape.hidden,
          shape.experts,
          shape.top_k,
          shape.max_tokens,
          static_cast<std::int32_t>(shape.dtype),
          lanes,
          Env::get().first_epoch,
          0,
          0};
}

Peer Region::peer(int rank, int lane) const {
  const int self = communicator().rank();
  std::byte* const theirs = this->lane(rank, lane);
  return {theirs + pairs_.of(self), this->lane(self, lane) + pairs_.of(rank), theirs};
}

/// Every word is the epoch before the first; of this rank's own, no worker is done.
void Region::set_words(const Request& request) const {
  const Communicator& communicator = block_.communicator();
  const Epoch first = request.agreement.first_epoch;
  std::vector<Epoch> own(pairs_.first / sizeof(Epoch), first);
  for (const std::uint64_t offset : request.counters)
    std::fill_n(&own[offset / sizeof(Epoch) + 2], 2, 0);
  const std::vector<Epoch> words(pairs_.word_bytes / sizeof(Epoch), first);
  std::optional<DeviceWords> device;
  if (communicator.cuda_device() >= 0) device.emplace(communicator.cuda_device());
  auto copy = [&](std::byte* to, const std::vector<Epoch>& from) {
    const std::size_t bytes = from.size() * sizeof(Epoch);
    if (device)
      device->copy(to, from.data(), bytes);
    else
      std::memcpy(to, from.data(), bytes);
  };
  for (int l = 0; l < request.agreement.lanes; ++l) {
    std::byte* const mine = lane(communicator.rank(), l);
    copy(mine, own);
    for (int writer = 0; writer < communicator.size(); ++writer)
      copy(mine + pairs_.of(writer), words);
  }
  if (device) device->flush(Deadline::after(communicator.timeout()));
}

Region::Region(const std::shared_ptr<Communicator>& communicator, const Request& request)
    : block_(communicator,
             request.lane_bytes * static_cast<std::uint64_t>(request.agreement.lanes)),
      lane_bytes_(request.lane_bytes),
      pairs_(request.pairs) {
  const int rank = communicator->rank();
  set_words(request);
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
