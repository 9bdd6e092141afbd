// Delays before every step of the protocol in kernels, parts of it taken away, and ranks that stop
// in the middle of an operation.

#include "ep/protocol/faults.hpp"

#include <cuda_runtime_api.h>

#include <ostream>

#include "ranks/restore_faults.hpp"
#include "ranks/thread_ranks.hpp"

namespace expertwire::test {
namespace {

using ep::Fault;
using reference::Report;
using reference::RoundTripOptions;
using reference::RoutingPattern;
using reference::Workload;

const MoeShape kShape{64, 12, 3, 40, DType::bf16};

/// Rings of two frames, which are full at once.
HighThroughputOptions few_frames() {
  HighThroughputOptions options{kShape};
  options.pool_rows = HighThroughputOptions::kEveryRow;
  options.ring_frames = 2;
  return options;
}

template <class Object>
auto options_of() {
  if constexpr (std::is_same_v<Object, LowLatency>)
    return LowLatencyOptions{kShape};
  else
    return few_frames();
}

/// Steps of one mode on three ranks; errors of ranks count as wrong values.
template <class Object>
Report run(int steps, int timeout_ms) {
  const Workload workload({kShape, 3, 31, RoutingPattern::parse("masked:0.2"), true});
  Report total;
  std::mutex mutex;
  CommunicatorOptions options = small_arena();
  options.timeout = std::chrono::milliseconds(timeout_ms);
  with_thread_ranks(
      3,
      [&](const std::shared_ptr<Communicator>& communicator) {
        auto object = Object::create(communicator, options_of<Object>());
        Report mine;
        try {
          for (int step = 0; step < steps; ++step) {
            RoundTripOptions how;
            how.output =
                step % 2 == 0 ? HighThroughput::Output::pool : HighThroughput::Output::owned;
            how.in_place = step % 4 == 0;
            mine += round_trip(*object, *communicator, workload, step, how);
          }
        } catch (const Error& error) {
          mine += {1, 1, error.what()};
        }
        std::lock_guard lock(mutex);
        total += mine;
      },
      options);
  return total;
}

TEST(KernelFaults, DelaysChangeNothing) {
  const RestoreFaults restore;
  ep::set_delays(20, 1);
  for (const Report& report : {run<LowLatency>(60, 20000), run<HighThroughput>(60, 20000)}) {
    EXPECT_EQ(report.wrong, 0) << report.first_wrong;
    EXPECT_GT(report.checked, 1000);
  }
}

TEST(KernelFaults, WithoutFlagsRowsAreReadTooEarly) {
  const RestoreFaults restore;
  ep::remove_part(Fault::flag);
  ep::set_delays(50, 1);
  std::int64_t found = run<LowLatency>(60, 2000).wrong;
  EXPECT_GT(found, 0);
  EXPECT_GT(run<HighThroughput>(60, 2000).wrong, 0);
}

/// The wrong values that two modes make without an order (an acquire, a release) are recorded, and
/// no more: a GPU may keep an order that nobody asked for. The model of tests/unit/lane_test.cpp
/// finds each of them missing. Credit and flags are not orders; what goes wrong without them is in
/// tests/ranks/fault_test.cpp, which is compiled for GPUs, too.
TEST(KernelFaults, OrdersAreTakenAway) {
  const RestoreFaults restore;
  constexpr std::pair<Fault, const char*> kParts[] = {
      {Fault::none, "none"},
      {Fault::credit_acquire, "credit_acquire"},
      {Fault::credit_release, "credit_release"},
      {Fault::flag_acquire, "flag_acquire"},
      {Fault::flag_release, "flag_release"},
  };
  for (const auto& [part, name] : kParts) {
    ep::remove_part(part);
    ep::set_delays(20, 1);
    const std::int64_t low = run<LowLatency>(40, 2000).wrong;
    const std::int64_t high = run<HighThroughput>(40, 2000).wrong;
    RecordProperty(std::string("low_latency_without_") + name, std::to_string(low));
    RecordProperty(std::string("high_throughput_without_") + name, std::to_string(high));
    if (part == Fault::none) {
      EXPECT_EQ(low, 0);
      EXPECT_EQ(high, 0);
    }
  }
}

/// Which rank stops where, and what its peers then wait for.
struct Stop {
  const char* name;
  Phase at;
  bool high_throughput;
};

void PrintTo(const Stop& stop, std::ostream* out) { *out << stop.name; }

class StoppedRank : public testing::TestWithParam<Stop> {};

TEST_P(StoppedRank, IsNamedAndTheContextLives) {
  const RestoreFaults restore;
  const Stop& stop = GetParam();
  const Workload workload({kShape, 3, 8, RoutingPattern::parse("uniform")});
  CommunicatorOptions options = small_arena();
  options.timeout = std::chrono::milliseconds(400);
  std::atomic<int> named{0}, others_done{0};
  auto body = [&](auto& object, const std::shared_ptr<Communicator>& communicator) {
    try {
      round_trip(object, *communicator, workload, 0, {});  // a good one first
      communicator->barrier();
      ep::stop_rank(1, static_cast<std::int32_t>(stop.at));
      for (int step = 1; step < 4; ++step) round_trip(object, *communicator, workload, step, {});
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::timeout) << error.what();
      EXPECT_EQ(error.rank(), communicator->rank());
      if (communicator->rank() != 1) {
        EXPECT_GE(error.peer(), 0);
        EXPECT_NE(error.phase(), Phase::none);
        EXPECT_NE(said(object.status()), "");
        if (error.peer() == 1) ++named;
        EXPECT_THROW(round_trip(object, *communicator, workload, 0, {}), Error);
      }
    }
    // A rank that stops does not leave: its own calls may end, but others find it by the deadline.
    if (communicator->rank() != 1) ++others_done;
    const auto patience = Deadline::after(std::chrono::seconds(5));
    while (communicator->rank() == 1 && others_done < 2 && !patience.expired())
      std::this_thread::yield();
  };
  with_thread_ranks(
      3,
      [&](const std::shared_ptr<Communicator>& communicator) {
        if (stop.high_throughput)
          body(*HighThroughput::create(communicator, {kShape}), communicator);
        else
          body(*LowLatency::create(communicator, {kShape}), communicator);
      },
      options);
  EXPECT_GE(named, 1);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  ep::stop_rank(-1, -1);
  // The remaining two ranks go on with a new communicator, in the same process and context.
  const Workload smaller({kShape, 2, 8, RoutingPattern::parse("uniform")});
  Reports reports;
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ll = LowLatency::create(communicator, {kShape});
    auto ht = HighThroughput::create(communicator, {kShape});
    reports.add(round_trip(*ll, *communicator, smaller, 0, {}));
    reports.add(round_trip(*ht, *communicator, smaller, 0, {}));
  });
}

INSTANTIATE_TEST_SUITE_P(Phases, StoppedRank,
                         testing::Values(Stop{"ll_dispatch_credit", Phase::credit, false},
                                         Stop{"ll_dispatch_counts", Phase::counts, false},
                                         Stop{"ll_dispatch_rows", Phase::dispatch_rows, false},
                                         Stop{"ll_combine_rows", Phase::combine_rows, false},
                                         Stop{"ll_release", Phase::release, false},
                                         Stop{"ht_credit", Phase::credit, true},
                                         Stop{"ht_counts", Phase::counts, true},
                                         Stop{"ht_dispatch_rows", Phase::dispatch_rows, true},
                                         Stop{"ht_combine_rows", Phase::combine_rows, true},
                                         Stop{"ht_release", Phase::release, true}),
                         [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace expertwire::test
