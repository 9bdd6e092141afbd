// Low-latency rows are made and sent in the same way whatever fits into a block's shared memory.

#include "expertwire/low_latency.hpp"
#include "ranks/thread_ranks.hpp"

namespace expertwire::test {
namespace {

using reference::RoundTripOptions;

struct Case {
  std::string name;
  MoeShape shape;
  int sms;
};

class Images : public testing::TestWithParam<Case> {};

TEST_P(Images, RowsAreTheSame) {
  const Case& c = GetParam();
  const reference::Workload workload(
      {c.shape, 3, 17, reference::RoutingPattern::parse("masked:0.3"), true});
  CommunicatorOptions memory = small_arena();
  memory.arena_bytes = LowLatency::memory_bytes({c.shape}, 3) + (std::size_t{16} << 20);
  Reports reports;
  with_thread_ranks(
      3,
      [&](const std::shared_ptr<Communicator>& communicator) {
        LowLatencyOptions options{c.shape};
        options.sms = c.sms;
        auto object = LowLatency::create(communicator, options);
        for (int step = 0; step < 12; ++step) {
          RoundTripOptions how;
          how.payload =
              std::array{RoundTripOptions::Payload::plain, RoundTripOptions::Payload::cast,
                         RoundTripOptions::Payload::fp8}[static_cast<std::size_t>(step % 3)];
          how.split = step % 4 >= 2;
          reports.add(round_trip(*object, *communicator, workload, step, how));
        }
      },
      memory);
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, Images,
    testing::Values(
        // All tokens of a block at a time; more batches than one; the last one smaller.
        Case{"kept", {512, 24, 6, 14, DType::bf16}, 2},
        Case{"batches", {512, 24, 6, 61, DType::bf16}, 2},
        Case{"one_block", {1024, 24, 4, 37, DType::fp32}, 1},
        // Two rows of 96 KB fit, one of 256 KB does not.
        Case{"long_rows", {24576, 12, 2, 9, DType::fp32}, 2},
        Case{"longer_than_a_block_has", {65536, 12, 2, 5, DType::fp32}, 2}),
    [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace expertwire::test
