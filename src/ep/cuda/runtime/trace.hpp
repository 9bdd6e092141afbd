#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "base/device_tensors.hpp"
#include "ep/cuda/kernel/context.hpp"

namespace expertwire::inline v0::ep::cuda {

/// Times of one operation: all kernels that a call launched.
struct OperationTimes {
  std::string operation;
  std::uint64_t start_ns = 0, end_ns = 0;  ///< on the clock of the device
  double span_us = 0;  ///< from the first start of a block to the last end, over all its kernels
  /// When blocks came to a mark, after the operation's first start: the first, the mean and the
  /// last block. 0 where no block noted it.
  struct Moment {
    double first = 0, mean = 0, last = 0;
  };
  std::vector<std::array<Moment, kMarks>> kernels;  ///< in the order of launches
};

/// Has kernels note when their blocks do what. While one lives, it traces what its thread's calls
/// launch; calls with the same name one behind the other are one operation.
class Trace {
 public:
  /// Room for `launches`; later ones are not traced.
  Trace(int device, int launches);
  Trace(const Trace&) = delete;
  Trace& operator=(const Trace&) = delete;
  ~Trace();

  /// Device memory for the next launch of the calling thread, or null if nothing is traced.
  static std::uint64_t* next(const char* operation);

  /// What was noted since the last time, once the work is done. Launches that were captured note
  /// again whenever their graph runs.
  std::vector<OperationTimes> read();

 private:
  DeviceTensors tensors_;
  std::uint64_t* memory_;
  int room_;
  std::vector<std::string> operations_;  // of the launches so far
};

}  // namespace expertwire::ep::cuda
