#pragma once

namespace expertwire {

/// cudaStreamSynchronize; throws `Error{unsupported}` in builds without CUDA.
void synchronize_cuda_stream(void* stream);

}  // namespace expertwire
