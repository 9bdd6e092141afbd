#include "ep/cuda/runtime/device_share.hpp"

#include "base/check.hpp"
#include "base/env.hpp"
#include "comm/communicator_access.hpp"

namespace expertwire::inline v0::ep::cuda {

std::shared_ptr<DeviceShare> DeviceShare::of(Communicator& communicator) {
  return std::static_pointer_cast<DeviceShare>(CommunicatorAccess::shared_state(
      communicator, [&] { return std::make_shared<DeviceShare>(communicator); }));
}

namespace {

int attribute_of(int device, cudaDeviceAttr attribute) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

int sms_of(const Communicator& communicator) {
  const int sms = attribute_of(communicator.cuda_device(), cudaDevAttrMultiProcessorCount);
  const int ranks = communicator.topology().ranks_on_gpu(communicator.rank());
  check(ranks <= sms, ErrorCode::unsupported, "{} ranks share a GPU of {} SMs; at most {} can",
        ranks, sms, sms);
  return sms / ranks;
}

/// What kernels declare in their code: a few words.
constexpr std::uint32_t kOwnSharedBytes = 1024;

}  // namespace

DeviceShare::DeviceShare(const Communicator& communicator)
    : device_(communicator.cuda_device()),
      sms_(sms_of(communicator)),
      bulk_copies_(attribute_of(device_, cudaDevAttrComputeCapabilityMajor) >= 9 &&
                   Env::get().cuda_copies != "vector"),
      shared_bytes_(static_cast<std::uint32_t>(
                        attribute_of(device_, cudaDevAttrMaxSharedMemoryPerBlockOptin)) -
                    kOwnSharedBytes),
      memory_stream_(make_cuda_stream(device_)),
      order_(device_) {}

void DeviceShare::join(int sms) {
  std::lock_guard lock(order_mutex_);
  joined_ += sms;
}

void DeviceShare::leave(int sms) {
  std::lock_guard lock(order_mutex_);
  joined_ -= sms;
}

std::shared_ptr<CUstream_st> DeviceShare::take_stream() {
  std::shared_ptr<CUstream_st> stream;
  {
    std::lock_guard lock(streams_mutex_);
    if (!free_streams_.empty()) {
      stream = std::move(free_streams_.back());
      free_streams_.pop_back();
    }
  }
  if (stream == nullptr) stream = make_cuda_stream(device_);
  cudaStream_t taken = stream.get();
  return {taken, [share = shared_from_this(), stream](cudaStream_t) {
            std::lock_guard lock(share->streams_mutex_);
            share->free_streams_.push_back(stream);
          }};
}

void DeviceShare::enter_order(const StreamPlace& place) {
  if (joined_ > sms_) order_.enter(place);
}

/// Always noted: the next call may be of an object with which the lanes do not fit any more.
void DeviceShare::leave_order(const StreamPlace& place) { order_.leave(place); }

}  // namespace expertwire::ep::cuda
