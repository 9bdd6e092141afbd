#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "ep/cuda/runtime/chain.hpp"
#include "expertwire/communicator.hpp"

namespace expertwire::inline v0::ep::cuda {

/// A rank's share of its device, common to all objects of a communicator. Kernels that wait for
/// peers must be resident at the same time as those they wait for. If all lanes' kernels fit side
/// by side they run as they come; otherwise in the order of the calls, which is the same on all
/// ranks.
class DeviceShare : public std::enable_shared_from_this<DeviceShare> {
 public:
  static std::shared_ptr<DeviceShare> of(Communicator& communicator);
  explicit DeviceShare(const Communicator& communicator);

  /// Whether the device has a bulk copy engine (Hopper and later) and kernels are to use it.
  bool bulk_copies() const { return bulk_copies_; }
  /// Shared memory that a block may have beside what a kernel takes by itself.
  std::uint32_t shared_bytes() const { return shared_bytes_; }
  /// SMs of the device over the ranks that share it.
  int sms() const { return sms_; }
  int device() const { return device_; }
  /// A stream on which memory is taken and given back; kernels never run there.
  const std::shared_ptr<CUstream_st>& memory_stream() const { return memory_stream_; }

  /// A stream that nobody else has; it comes back with its last owner, idle. Streams are kept:
  /// making one takes memory of the device that the driver may not give back.
  std::shared_ptr<CUstream_st> take_stream();

  /// What this GPU writes to a peer, in bytes a microsecond; 0 before it has been measured.
  double link_bytes_per_us = 0;

  /// A lane says how many SMs it uses at most.
  void join(int sms);
  void leave(int sms);

  /// Held from before a call's work is ordered until it has been launched, so that no other call
  /// comes between.
  std::mutex& order() { return order_mutex_; }
  /// Under order().
  void enter_order(const StreamPlace& place);
  void leave_order(const StreamPlace& place);

 private:
  int device_;
  int sms_;
  bool bulk_copies_;
  std::uint32_t shared_bytes_;
  std::shared_ptr<CUstream_st> memory_stream_;
  std::mutex streams_mutex_;
  std::vector<std::shared_ptr<CUstream_st>> free_streams_;  // guarded by streams_mutex_
  std::mutex order_mutex_;
  int joined_ = 0;  // guarded by order_mutex_, as the chain
  Chain order_;
};

}  // namespace expertwire::ep::cuda
