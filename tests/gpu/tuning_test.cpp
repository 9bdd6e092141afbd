// However dispatch is cut to the machine, its results are the same.

#include "expertwire/error.hpp"
#include "expertwire/high_throughput.hpp"
#include "ranks/thread_ranks.hpp"

namespace expertwire::test {
namespace {

using reference::RoundTripOptions;

class Tuned : public testing::TestWithParam<Tuning> {};

TEST_P(Tuned, RowsAreTheSame) {
  // Rows of 14 KB have several pieces where rings are small; ranks differ in what they ask for.
  const MoeShape shape{7168, 24, 6, 70, DType::bf16};
  const reference::Workload workload(
      {shape, 3, 31, reference::RoutingPattern::parse("uniform"), true});
  CommunicatorOptions memory = small_arena();
  HighThroughputOptions options{shape};
  options.pool_rows = HighThroughputOptions::kEveryRow;
  memory.arena_bytes = HighThroughput::memory_bytes(options, 3) + (std::size_t{16} << 20);
  Reports reports;
  with_thread_ranks(
      3,
      [&](const std::shared_ptr<Communicator>& communicator) {
        HighThroughputOptions mine = options;
        if (communicator->rank() != 1) mine.tuning = GetParam();
        auto object = HighThroughput::create(communicator, mine);
        for (int step = 0; step < 6; ++step) {
          RoundTripOptions how;
          how.output = step % 2 == 0 ? HighThroughput::Output::owned : HighThroughput::Output::pool;
          if (step % 3 == 2) how.payload = RoundTripOptions::Payload::fp8;
          reports.add(round_trip(*object, *communicator, workload, step, how));
        }
      },
      memory);
}

INSTANTIATE_TEST_SUITE_P(Choices, Tuned,
                         testing::Values(Tuning{1, 16384}, Tuning{2, 28672}, Tuning{6, 100000},
                                         Tuning{8, 0}, Tuning{15, 229376}, Tuning{0, 16400}),
                         [](const auto& test) {
                           return "warps_" + std::to_string(test.param.sender_warps) + "_ring_" +
                                  std::to_string(test.param.ring_bytes);
                         });

TEST(TuningOnDevice, RefusesWhatCannotBe) {
  with_thread_ranks(1, [&](const std::shared_ptr<Communicator>& communicator) {
    for (const Tuning& wrong :
         {Tuning{16, 0}, Tuning{-1, 0}, Tuning{0, 16383}, Tuning{0, 229377}, Tuning{0, -5}}) {
      HighThroughputOptions options{MoeShape{64, 8, 2, 16, DType::bf16}};
      options.tuning = wrong;
      try {
        HighThroughput::create(communicator, options);
        ADD_FAILURE() << wrong.sender_warps << " " << wrong.ring_bytes;
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
        EXPECT_NE(std::string(error.what()).find("tuning."), std::string::npos) << error.what();
      }
    }
  });
}

}  // namespace
}  // namespace expertwire::test
