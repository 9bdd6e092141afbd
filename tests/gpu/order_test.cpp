// The order of calls on a device: between objects, between streams that look alike, and what a
// communicator shares.

#include <cstring>
#include <future>
#include <thread>

#include "comm/shared_block.hpp"
#include "device/spin.hpp"
#include "gpu/buffers.hpp"
#include "ranks/requests.hpp"

namespace expertwire::test {
namespace {

using reference::RoutingPattern;
using reference::Workload;

constexpr int kRanks = 2;
const MoeShape kWide{512, 8, 2, 32, DType::bf16};
constexpr std::int64_t kRows = kRanks * 32;

CommunicatorOptions impatient() {
  CommunicatorOptions options = small_arena();
  options.timeout = std::chrono::milliseconds(4000);
  return options;
}

/// One dispatch with a capacity into outputs of its own.
struct OneDispatch {
  StepInputs in;
  HighThroughput::Outputs outputs;

  OneDispatch(Buffers& b, const Workload& workload, int rank, int step)
      : in(b, kWide, workload.input(rank, step).tokens),
        outputs{b.make(kWide.dtype, {kRows, kWide.hidden}), b.make(DType::int32, {kRows}),
                b.make(DType::int32, {kRows, kWide.top_k}),
                b.make(DType::fp32, {kRows, kWide.top_k})} {
    const auto input = workload.input(rank, step);
    in.fill(b, input);
    b.synchronize();
  }
  HighThroughput::DispatchResult run(HighThroughput& object, const Stream& stream) const {
    HighThroughput::DispatchRequest request;
    request.x = in.x;
    request.topk_idx = in.topk_idx;
    request.topk_weights = in.topk_weights;
    request.capacity = kRows;
    request.outputs = outputs;
    request.stream = stream;
    return object.dispatch(request);
  }
};

/// The rows that must have come, as bytes.
std::vector<std::byte> rows_of(const Workload& workload, int rank, int step) {
  std::vector<std::byte> rows;
  for (const auto& row : reference::Oracle(workload, step).token_major(rank)) {
    const auto input = workload.input(row.source, step);
    const auto* x = input.x.data() + static_cast<std::size_t>(row.token) * kWide.row_bytes();
    rows.insert(rows.end(), x, x + kWide.row_bytes());
  }
  return rows;
}

void expect_rows(const Buffers& buffers, const OneDispatch& got, const Workload& workload, int rank,
                 int step) {
  const auto want = rows_of(workload, rank, step);
  auto rows = buffers.download(got.outputs.x);
  rows.resize(want.size());
  EXPECT_EQ(rows, want);
  EXPECT_FALSE(want.empty());
}

/// What was queued before a second object was made comes before that one's operations. Each takes
/// the whole device; were the second's first on a rank, both would wait for ever.
TEST(Order, OfAnEarlierObjectIsKeptForALaterOne) {
  const Workload workload({kWide, kRanks, 3, RoutingPattern::parse("uniform")});
  with_thread_ranks(
      kRanks,
      [&](const std::shared_ptr<Communicator>& communicator) {
        const int rank = communicator->rank();
        Buffers a(communicator->cuda_device()), b(communicator->cuda_device());
        const Stream on_a = Stream::cuda(a.stream()), on_b = Stream::cuda(b.stream());
        const OneDispatch first(a, workload, rank, 0), second(b, workload, rank, 1);
        auto earlier = HighThroughput::create(communicator, {kWide});
        if (rank == 1) check_cuda(launch_spin(200'000'000, a.stream()), "launch of spin");
        first.run(*earlier, on_a);
        auto later = HighThroughput::create(communicator, {kWide});
        second.run(*later, on_b);
        expect_rows(b, second, workload, rank, 1);
        expect_rows(a, first, workload, rank, 0);
        EXPECT_EQ(said(earlier->status()), "");
        EXPECT_EQ(said(later->status()), "");
        communicator->barrier();
      },
      impatient());
}

/// The default stream of each thread has the same handle, and is another stream.
TEST(Order, OfTwoThreadsDefaultStreams) {
  const Workload workload({kWide, kRanks, 4, RoutingPattern::parse("uniform")});
  with_thread_ranks(
      kRanks,
      [&](const std::shared_ptr<Communicator>& communicator) {
        const int rank = communicator->rank();
        Buffers buffers(communicator->cuda_device());
        const OneDispatch first(buffers, workload, rank, 0), second(buffers, workload, rank, 1);
        HighThroughputOptions options{kWide};
        options.sms = 16;  // both would fit side by side
        auto object = HighThroughput::create(communicator, options);
        check_cuda(launch_spin(50'000'000, cudaStreamPerThread), "launch of spin");
        Stream mine = Stream::cuda(cudaStreamPerThread);
        first.run(*object, mine);
        std::async(std::launch::async, [&] {
          cudaSetDevice(communicator->cuda_device());
          Stream its = Stream::cuda(cudaStreamPerThread);
          second.run(*object, its);
          its.synchronize();
        }).get();
        mine.synchronize();
        expect_rows(buffers, first, workload, rank, 0);
        expect_rows(buffers, second, workload, rank, 1);
        EXPECT_EQ(said(object->status()), "");
        communicator->barrier();
      },
      impatient());
}

/// Words of host memory by which ranks tell each other things, on the CUDA backend, too.
TEST(Order, SignalsToHostMemoryFollowPutsToTheDevice) {
  with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
    const int rank = communicator->rank(), peer = 1 - rank;
    Arena& host = communicator->host_arena();
    std::vector<std::uint64_t> places(kRanks);
    places[static_cast<std::size_t>(rank)] =
        host.carve(64, Deadline::after(std::chrono::seconds(1)));
    const std::uint64_t mine = places[static_cast<std::size_t>(rank)];
    std::memset(host.local().data() + mine, 0, 64);
    const SharedBlock block(communicator, 4096);
    communicator->all_gather(places.data(), sizeof(std::uint64_t));
    const std::uint64_t theirs = places[static_cast<std::size_t>(peer)];
    Connection& connection = communicator->connection(peer);
    const Memory& from = communicator->arena().local();
    const auto offset_at = [&](int owner) {
      return static_cast<std::uint64_t>(block.base(owner) -
                                        communicator->arena().part(owner).data());
    };
    Buffers buffers(communicator->cuda_device());
    const std::vector<std::uint32_t> value(512, 1000U + static_cast<std::uint32_t>(rank));
    buffers.copy(block.base(rank), value.data(), 2048);
    buffers.synchronize();
    connection.put(
        {communicator->arena().part(peer), offset_at(peer) + 2048, from, offset_at(rank), 2048});
    connection.signal({host.part(peer), theirs, 7});
    connection.atomic_add({host.part(peer), theirs + 8, -3});
    const auto* words = reinterpret_cast<std::uint64_t*>(host.local().data() + mine);
    const auto most = Deadline::after(std::chrono::seconds(10));
    while (std::atomic_ref(const_cast<std::uint64_t&>(words[1])).load() == 0 && !most.expired())
      std::this_thread::yield();
    EXPECT_EQ(words[0], 7U);
    EXPECT_EQ(static_cast<std::int64_t>(words[1]), -3);
    std::vector<std::uint32_t> got(512);
    buffers.copy(got.data(), block.base(rank) + 2048, 2048);
    buffers.synchronize();
    EXPECT_EQ(got, std::vector<std::uint32_t>(512, 1000U + static_cast<std::uint32_t>(peer)));
    communicator->barrier();
    host.give_back(mine);
  });
}

/// What a communicator knows of its device is its own, also when an earlier one, of which a handle
/// is kept, lay at the same address.
TEST(Order, ALaterCommunicatorHasItsOwnDevice) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices < kRanks)
    GTEST_SKIP() << "two GPUs are needed; tools/gpu_check.sh runs this where they are";
  const Workload workload({kWide, kRanks, 3, RoutingPattern::parse("uniform")});
  run_in_process(kRanks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    std::vector<Handle> kept;
    const int rank = bootstrap->rank();
    for (int round = 0; round < 4; ++round) {
      CommunicatorOptions options = impatient();
      options.cuda_device = (rank + round) % kRanks;
      auto communicator = Communicator::create(bootstrap, options);
      Buffers buffers(*options.cuda_device);
      Stream stream = Stream::cuda(buffers.stream());
      const OneDispatch one(buffers, workload, rank, round);
      auto object = HighThroughput::create(communicator, {kWide});
      kept.push_back(one.run(*object, stream).handle);
      expect_rows(buffers, one, workload, rank, round);
      cudaPointerAttributes where{};
      Request<HighThroughput> request(*communicator, workload, round);
      const auto owned = object->dispatch(request.dispatch);
      check_cuda(cudaPointerGetAttributes(&where, owned.outputs.x.data()), "attributes");
      EXPECT_EQ(where.device, *options.cuda_device);
      communicator->barrier();
    }
  });
}

/// Two objects, a thread each, with budgets that fit side by side: their calls come in another
/// order on each rank, so nothing may queue behind the other object's calls.
TEST(Order, TwoThreadsDriveAnObjectEach) {
  const Workload workload({kWide, kRanks, 6, RoutingPattern::parse("uniform"), true});
  Reports reports;
  with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
    HighThroughputOptions high{kWide};
    LowLatencyOptions low{kWide};
    high.sms = low.sms = 8;
    auto ht = HighThroughput::create(communicator, high);
    auto ll = LowLatency::create(communicator, low);
    auto other = std::async(std::launch::async, [&] {
      for (int step = 0; step < 60; ++step)
        reports.add(round_trip(*ll, *communicator, workload, step, {}));
    });
    for (int step = 0; step < 60; ++step)
      reports.add(round_trip(*ht, *communicator, workload, step, {}));
    other.get();
    communicator->barrier();
  });
}

}  // namespace
}  // namespace expertwire::test
