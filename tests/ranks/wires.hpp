#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "comm/transport/ucx/engine.hpp"
#include "expertwire/communicator.hpp"
#include "ranks/processes.hpp"
#include "ranks/shared_memory.hpp"
#include "ranks/thread_ranks.hpp"

namespace expertwire::test {

inline std::string name_of(Wire wire) {
  return wire == Wire::loopback ? "loopback" : wire == Wire::shm ? "shm" : "ucx";
}

/// Why a wire cannot be had here; empty if it can. On ucx threads of one process go over the
/// network, as far as it is one: by TCP over lo.
inline std::string why_not(Wire wire) {
  if (wire == Wire::ucx && !ucx_presence().present) return "no UCX: " + ucx_presence().why_not;
  for (int rank = 0; kOnCuda && wire == Wire::shm && rank < 3; ++rank)
    if (cuda_device_of(rank) != rank) return "three processes need three GPUs";
  return "";
}

/// Runs `body(communicator)` on ranks that reach each other by `wire`: threads, or processes where
/// that is what the wire joins. What a process expects in vain fails the test, too.
inline void with_wire(Wire wire, int ranks,
                      const std::function<void(const std::shared_ptr<Communicator>&)>& body,
                      CommunicatorOptions options = small_arena()) {
  if (wire == Wire::ucx) options.network_pairs = "all";
  if (wire != Wire::shm) return with_thread_ranks(ranks, body, options);
  const ExitCodes codes = run_processes(ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    if (kOnCuda) options.cuda_device = cuda_device_of(bootstrap->rank());
    body(Communicator::create(std::move(bootstrap), options));
    return testing::Test::HasFailure() ? 1 : 0;
  });
  EXPECT_EQ(codes, ExitCodes(static_cast<std::size_t>(ranks), 0));
}

}  // namespace expertwire::test
