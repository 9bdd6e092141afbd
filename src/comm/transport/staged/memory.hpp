#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "comm/transport/transport.hpp"

namespace expertwire::inline v0 {

/// Device memory that is out of reach: a part without an address.
Memory import_staged(const ImportRequest& request);

/// Host memory of a segment that GPUs of this process map, piece by piece as it is asked for. Its
/// thread ranks share it. What has been mapped stays mapped until this process has no such segment
/// any more: unmapping waits for whole devices and holds the driver meanwhile, and a kernel there
/// may be waiting for a rank that needs the driver.
class PinnedSegment {
 public:
  /// Of the segment that begins at `mapping`.
  static std::shared_ptr<PinnedSegment> of(const std::shared_ptr<std::byte>& mapping);

  PinnedSegment(const PinnedSegment&) = delete;
  PinnedSegment& operator=(const PinnedSegment&) = delete;
  ~PinnedSegment();

  /// Where GPUs of this process find `bytes` at `offset`, for a rank of `device`. Throws
  /// `Error{system}` with what to do when the system does not let them.
  std::byte* map(int device, std::uint64_t offset, std::size_t bytes);

 private:
  explicit PinnedSegment(std::shared_ptr<std::byte> mapping);

  struct State;
  struct Registry;
  std::unique_ptr<State> state_;
};

}  // namespace expertwire
