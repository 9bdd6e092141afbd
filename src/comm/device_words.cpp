#include "comm/device_words.hpp"

#include <thread>

#include "base/check.hpp"
#include "base/cuda.hpp"
#include "device/words.hpp"

namespace expertwire::inline v0 {

DeviceWords::DeviceWords(int device) : device_(device) {}
DeviceWords::~DeviceWords() = default;

cudaStream_t DeviceWords::stream() const {
  std::call_once(made_, [this] { stream_ = make_cuda_stream(device_); });
  return stream_.get();
}

void DeviceWords::copy(void* to, const void* from, std::size_t bytes) const {
  const DeviceGuard guard(device_);
  if (bytes > 0)
    check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream()), "cudaMemcpyAsync");
}

void DeviceWords::set(std::uint64_t* word, std::uint64_t value) const {
  const DeviceGuard guard(device_);
  check_cuda(launch_set_word(word, value, stream()), "launch of set_word");
}

void DeviceWords::add(std::uint64_t* word, std::int64_t value) const {
  const DeviceGuard guard(device_);
  check_cuda(launch_add_to_word(word, value, stream()), "launch of add_to_word");
}

void DeviceWords::zero(void* data, std::size_t bytes) const {
  const DeviceGuard guard(device_);
  check_cuda(cudaMemsetAsync(data, 0, bytes, stream()), "cudaMemsetAsync");
}

std::uint64_t DeviceWords::read(const std::uint64_t* word) const {
  const DeviceGuard guard(device_);
  std::uint64_t value = 0;
  copy(&value, word, sizeof(value));
  check_cuda(cudaStreamSynchronize(stream()), "cudaStreamSynchronize");
  return value;
}

void DeviceWords::flush(Deadline deadline) const {
  const DeviceGuard guard(device_);
  for (;;) {
    const cudaError_t state = cudaStreamQuery(stream());
    if (state == cudaSuccess) return;
    if (state != cudaErrorNotReady) check_cuda(state, "cudaStreamQuery");
    check(!deadline.expired(), ErrorCode::timeout, "flush waited {} ms for device {}",
          deadline.budget().count(), device_);
    std::this_thread::yield();
  }
}

}  // namespace expertwire
