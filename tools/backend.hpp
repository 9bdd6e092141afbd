#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "expertwire/communicator.hpp"

namespace expertwire::tools {

/// What `--device` takes: cpu, cuda, or auto (cuda where there is a GPU).
bool wants_cuda(const std::string& device);

/// Options for a communicator of `device`. Ranks of one host take its GPUs in turn. On CUDA the
/// arena has room for `arena_bytes` besides what the library needs itself.
CommunicatorOptions communicator_options(const std::string& device, int local_rank,
                                         std::size_t arena_bytes);

/// This process's place among the ranks of its host, by its launcher.
int local_rank();

}  // namespace expertwire::tools
