#pragma once

// What every layer needs of CUDA. Only files that are compiled in CUDA builds include this.

#include <cuda_runtime_api.h>

#include <memory>
#include <new>

namespace expertwire::inline v0 {

/// Throws `Error{system}` naming the call and CUDA's text unless `result` is success.
void check_cuda(cudaError_t result, const char* call);

/// Makes `device` the calling thread's current device until the end of the scope, and keeps
/// captures that other threads have under way, in whatever mode, from forbidding what is called in
/// it.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  /// For destructors: errors show in what is called behind it.
  DeviceGuard(int device, std::nothrow_t) noexcept;
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard();

 private:
  int before_ = -1;
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

/// A stream of ours that does not wait for the legacy default stream; destroyed with the last copy.
std::shared_ptr<CUstream_st> make_cuda_stream(int device);

/// Memory of `device`, taken and given back in the order of `stream`, so that neither waits for
/// kernels elsewhere. `stream` is for memory alone: the call waits for it.
std::shared_ptr<void> allocate_on_device(std::size_t bytes, int device,
                                         std::shared_ptr<CUstream_st> stream);

/// Host memory that kernels of all devices read and write; zeroed. Kept for the next user when it
/// is given back.
std::shared_ptr<void> allocate_pinned(std::size_t bytes);

}  // namespace expertwire
