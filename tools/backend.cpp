#include "backend.hpp"

#include <fmt/format.h>

#include <stdexcept>

#include "base/env.hpp"

namespace expertwire::tools {

bool wants_cuda(const std::string& device, int gpus) {
  if (device != "auto" && device != "cpu" && device != "cuda")
    throw std::invalid_argument(fmt::format("--device '{}' must be auto, cpu or cuda", device));
  if (device == "cuda" && cuda_device_count() == 0)
    throw std::invalid_argument(
        "--device cuda: this process sees no CUDA device, or the build has no CUDA");
  return device == "cuda" || (device == "auto" && cuda_device_count() >= gpus);
}

CommunicatorOptions communicator_options(bool cuda, int local_rank, std::size_t arena_bytes) {
  constexpr std::size_t kSlack = std::size_t{16} << 20;
  CommunicatorOptions options;
  if (!cuda) return options;
  options.cuda_device = local_rank % cuda_device_count();
  options.arena_bytes = arena_bytes + kSlack;
  return options;
}

int local_rank() { return Env::get().rank.value_or(0) % local_size(); }
int local_size() { return Env::get().local_size.value_or(1); }

}  // namespace expertwire::tools
