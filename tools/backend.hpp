#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "expertwire/communicator.hpp"

namespace expertwire::tools {

/// What `--device` takes: cpu, cuda, or auto: cuda where there are `gpus` GPUs or more. Rank
/// processes need one each, rank threads one together.
bool wants_cuda(const std::string& device, int gpus);

/// Options for a communicator. Ranks of one host take its GPUs in turn. On CUDA the arena has room
/// for `arena_bytes` besides what the library needs itself.
CommunicatorOptions communicator_options(bool cuda, int local_rank, std::size_t arena_bytes);

/// This process's place among the ranks of its host, and their number, by its launcher.
int local_rank();
int local_size();

}  // namespace expertwire::tools
