#include "ep/region.hpp"

#include <algorithm>
#include <array>

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

struct Offer {
  Agreement agreement;
  std::uint64_t offset;
};

}  // namespace

Region::Region(std::shared_ptr<Communicator> communicator, const Request& request)
    : communicator_(std::move(communicator)),
      offset_(communicator_->arena().carve(request.lane_bytes *
                                           static_cast<std::uint64_t>(request.agreement.lanes))),
      lane_bytes_(request.lane_bytes) {
  try {
    const int rank = communicator_->rank();
    std::vector<Offer> offers(static_cast<std::size_t>(communicator_->size()));
    offers[static_cast<std::size_t>(rank)] = {request.agreement, offset_};
    communicator_->all_gather(offers.data(), sizeof(Offer));
    for (std::size_t peer = 0; peer < offers.size(); ++peer) {
      for (const Field& field : kFields)
        check(field.get(offers[peer].agreement) == field.get(request.agreement),
              ErrorCode::mismatch, "rank {} has {} = {}, rank {} has {}", peer, field.name,
              field.get(offers[peer].agreement), rank, field.get(request.agreement));
      std::byte* base = communicator_->arena().part(static_cast<int>(peer)).data();
      check(base != nullptr, ErrorCode::unsupported, "the memory of rank {} is not mapped here",
            peer);
      bases_.push_back(base + offers[peer].offset);
    }
    // All ranks are here, so nobody still writes for an object that had this memory before.
    for (int l = 0; l < request.agreement.lanes; ++l) {
      auto* words = reinterpret_cast<Epoch*>(lane(rank, l));
      std::fill(words, words + request.flag_bytes / sizeof(Epoch), request.agreement.first_epoch);
      // Counters of finished workers start at nothing; Direction finds them in DirectionWords.
    }
    communicator_->barrier();
  } catch (...) {
    communicator_->arena().give_back(offset_);
    throw;
  }
}

Region::~Region() {
  if (!abandoned_) communicator_->arena().give_back(offset_);
}

}  // namespace expertwire::ep
