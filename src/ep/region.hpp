#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "ep/lane.hpp"
#include "expertwire/communicator.hpp"
#include "expertwire/shape.hpp"

namespace expertwire::ep {

/// What ranks must agree on when they make an object together.
struct Agreement {
  std::int32_t mode;  ///< 0 low latency, 1 high throughput
  std::int32_t hidden, experts, top_k, max_tokens, dtype;
  std::int32_t lanes;
  std::uint32_t first_epoch;
  std::int64_t pool_rows;
};

/// The part of every rank's arena that one object uses: `lanes` pieces of equal layout.
class Region {
 public:
  struct Request {
    Agreement agreement;
    std::uint64_t lane_bytes;
    std::uint64_t flag_bytes;  ///< at the start of each lane, set to the first epoch
  };

  /// Collective. Throws `Error{mismatch}` that names the first thing ranks disagree on, and
  /// `Error{unsupported}` if a peer's memory is not mapped here.
  Region(std::shared_ptr<Communicator> communicator, const Request& request);
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  ~Region();

  Communicator& communicator() const { return *communicator_; }
  /// Start of `lane` in the memory of `rank`.
  std::byte* lane(int rank, int lane) const {
    return bases_[static_cast<std::size_t>(rank)] + static_cast<std::uint64_t>(lane) * lane_bytes_;
  }
  /// Keeps the memory from being used again: a late peer may still write to it.
  void abandon() { abandoned_ = true; }

 private:
  std::shared_ptr<Communicator> communicator_;
  std::uint64_t offset_;
  std::uint64_t lane_bytes_;
  std::vector<std::byte*> bases_;  // by rank
  bool abandoned_ = false;
};

}  // namespace expertwire::ep
