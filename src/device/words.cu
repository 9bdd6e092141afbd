#include "device/words.hpp"

#include "device/ptx.cuh"

namespace expertwire::inline v0 {

namespace {

__global__ void set_word(std::uint64_t* word, std::uint64_t value) {
  device::store_release_system(word, value);
}

__global__ void add_to_word(std::uint64_t* word, std::int64_t value) {
  device::add_release_system(word, static_cast<std::uint64_t>(value));
}

}  // namespace

cudaError_t launch_set_word(std::uint64_t* word, std::uint64_t value, cudaStream_t stream) {
  set_word<<<1, 1, 0, stream>>>(word, value);
  return cudaGetLastError();
}

cudaError_t launch_add_to_word(std::uint64_t* word, std::int64_t value, cudaStream_t stream) {
  add_to_word<<<1, 1, 0, stream>>>(word, value);
  return cudaGetLastError();
}

}  // namespace expertwire
