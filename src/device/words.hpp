#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace expertwire::inline v0 {

/// Sets, or adds to, a word of any rank's device memory, at system scope, after everything that
/// came before in the stream.
cudaError_t launch_set_word(std::uint64_t* word, std::uint64_t value, cudaStream_t stream);
cudaError_t launch_add_to_word(std::uint64_t* word, std::int64_t value, cudaStream_t stream);

}  // namespace expertwire
