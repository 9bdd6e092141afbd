#pragma once

namespace expertwire::inline v0 {

/// cudaStreamSynchronize; throws `Error{unsupported}` in builds without CUDA.
void synchronize_cuda_stream(void* stream);

/// The device on which memory lies, or kHost (tensor.hpp). Managed memory lies on `device`, where
/// it will be used. Throws `Error{unsupported}` in builds without CUDA.
int device_of_memory(const void* data, int device);

}  // namespace expertwire
