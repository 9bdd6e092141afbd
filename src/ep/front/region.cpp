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

/// Host memory of a rank for what staged peers write there: a pair a rank and lane, of which only
/// those of staged peers are touched.
struct Staging {
  std::uint64_t pair_bytes;
  int ranks;

  static constexpr std::uint64_t kPage = 4096;
  Staging(const Pairs& pairs, int size) : pair_bytes(align_up(pairs.bytes, kPage)), ranks(size) {}
  std::uint64_t of(int writer, int lane) const {
    return static_cast<std::uint64_t>(lane * ranks + writer) * pair_bytes;
  }
  std::uint64_t bytes(int lanes) const { return of(0, lanes); }
};

bool is_staged(const Communicator& communicator, int peer) {
  return communicator.path(peer).kind == PathKind::staged;
}

std::size_t staged_bytes(const Communicator& communicator, const Region::Request& request) {
  for (int peer = 0; peer < communicator.size(); ++peer)
    if (is_staged(communicator, peer))
      return Staging(request.pairs, communicator.size()).bytes(request.agreement.lanes);
  return 0;
}

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
  return {mode,        shape.hidden,          shape.experts,
          shape.top_k, shape.max_tokens,      static_cast<std::int32_t>(shape.dtype),
          lanes,       Env::get().first_epoch};
}

std::byte* Region::own_lane(int lane) const {
  return block_.base(communicator().rank()) + static_cast<std::uint64_t>(lane) * lane_bytes_;
}

Peer Region::find_peer(int rank, int lane) const {
  const int self = communicator().rank();
  if (is_staged(communicator(), rank)) {
    const Staging staging(pairs_, communicator().size());
    return {block_.staged(rank, staging.of(self, lane), pairs_.bytes),
            block_.staged(self, staging.of(rank, lane), pairs_.bytes), nullptr};
  }
  std::byte* const block = block_.base(rank);
  check(block != nullptr, ErrorCode::unsupported, "the memory of rank {} is not mapped here", rank);
  std::byte* const theirs = block + static_cast<std::uint64_t>(lane) * lane_bytes_;
  return {theirs + pairs_.of(self), own_lane(lane) + pairs_.of(rank), theirs};
}

int Region::staged_peers() const {
  return static_cast<int>(std::count_if(peers_.begin(), peers_.begin() + communicator().size(),
                                        [](const Peer& peer) { return peer.lane == nullptr; }));
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
    std::byte* const mine = own_lane(l);
    copy(mine, own);
    for (int writer = 0; writer < communicator.size(); ++writer) {
      copy(mine + pairs_.of(writer), words);
      const Peer& peer = this->peer(writer, l);
      if (peer.lane == nullptr)
        std::memcpy(const_cast<std::byte*>(peer.in), words.data(), words.size() * sizeof(Epoch));
    }
  }
  if (device) device->flush(Deadline::after(communicator.timeout()));
}

Region::Region(const std::shared_ptr<Communicator>& communicator, const Request& request)
    : block_(communicator, request.lane_bytes * static_cast<std::uint64_t>(request.agreement.lanes),
             staged_bytes(*communicator, request)),
      lane_bytes_(request.lane_bytes),
      pairs_(request.pairs) {
  const int rank = communicator->rank();
  for (int l = 0; l < request.agreement.lanes; ++l)
    for (int peer = 0; peer < communicator->size(); ++peer) peers_.push_back(find_peer(peer, l));
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
