// What captures leave behind: nothing that a later call waits for, and memory that is the graph's
// as long as it exists.

#include <cstring>
#include <thread>

#include "gpu/buffers.hpp"
#include "ranks/thread_ranks.hpp"

namespace expertwire::test {
namespace {

using reference::RoutingPattern;
using reference::Workload;

constexpr int kRanks = 2;
const MoeShape kShape{64, 12, 3, 24, DType::bf16};

/// One rank's tensors, and a pair of operations on them that can be captured.
struct Rank {
  MoeShape shape;
  std::int64_t rows;  ///< that can come
  Buffers buffers;
  Stream stream;
  StepInputs in;
  HighThroughput::Outputs outputs;
  TensorView out;
  Allocator allocator;

  Rank(const std::shared_ptr<Communicator>& communicator, const Workload& workload)
      : shape(workload.spec().shape),
        rows(communicator->size() * shape.max_tokens),
        buffers(communicator->cuda_device()),
        stream(Stream::cuda(buffers.stream())),
        in(buffers, shape, workload.input(communicator->rank(), 0).tokens),
        outputs{buffers.make(shape.dtype, {rows, shape.hidden}), buffers.make(DType::int32, {rows}),
                buffers.make(DType::int32, {rows, shape.top_k}),
                buffers.make(DType::fp32, {rows, shape.top_k})},
        out(buffers.make(shape.dtype, {in.x.size(0), shape.hidden})) {
    const auto input = workload.input(communicator->rank(), 0);
    in.fill(buffers, input);
    buffers.synchronize();
  }
  HighThroughput::DispatchRequest request() {
    HighThroughput::DispatchRequest dispatch;
    dispatch.x = in.x;
    dispatch.topk_idx = in.topk_idx;
    dispatch.topk_weights = in.topk_weights;
    dispatch.capacity = rows;
    dispatch.outputs = outputs;
    dispatch.allocator = allocator;
    dispatch.stream = stream;
    return dispatch;
  }
  void run(HighThroughput& object) {
    HighThroughput::CombineRequest combine;
    combine.handle = object.dispatch(request()).handle;
    combine.y = outputs.x;
    combine.out = out;
    combine.stream = stream;
    object.combine(combine);
  }
  cudaGraphExec_t capture(HighThroughput& object, cudaStreamCaptureMode mode) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    check_cuda(cudaStreamBeginCapture(buffers.stream(), mode), "cudaStreamBeginCapture");
    try {
      run(object);
    } catch (...) {
      cudaStreamEndCapture(buffers.stream(), &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      throw;
    }
    check_cuda(cudaStreamEndCapture(buffers.stream(), &graph), "cudaStreamEndCapture");
    check_cuda(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
    cudaGraphDestroy(graph);
    return executable;
  }
};

const Workload& workload() {
  static const Workload all({kShape, kRanks, 5, RoutingPattern::parse("uniform")});
  return all;
}

HighThroughputOptions options() {
  HighThroughputOptions result{kShape};
  result.sms = 8;
  result.pool_rows = HighThroughputOptions::kEveryRow;
  return result;
}

template <class Condition>
bool comes_true(Condition condition) {
  for (const auto most = Deadline::after(std::chrono::seconds(10)); !most.expired();) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return false;
}

/// A handle that a capture took from the object's memory is the graph's, and comes back with it.
TEST(Capture, HandlesComeBackWithTheirGraphs) {
  const MoeShape large{64, 16, 8, 4096, DType::bf16};  // handles of some 400 KB
  const Workload all({large, kRanks, 5, RoutingPattern::parse("uniform")});
  with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
    Rank rank(communicator, all);
    HighThroughputOptions wanted = options();
    wanted.shape = large;
    auto object = HighThroughput::create(communicator, wanted);
    rank.run(*object);
    const auto want = rank.buffers.download(rank.out);
    const auto used = [] {
      std::size_t free = 0, total = 0;
      cudaMemGetInfo(&free, &total);
      return total - free;
    };
    std::size_t before = 0;
    for (int i = 0; i < 300; ++i) {
      if (i == 20) before = used();
      const cudaGraphExec_t graph = rank.capture(*object, cudaStreamCaptureModeThreadLocal);
      communicator->barrier();
      rank.buffers.poison(rank.out);
      for (int replay = 0; replay < 2; ++replay)
        check_cuda(cudaGraphLaunch(graph, rank.buffers.stream()), "cudaGraphLaunch");
      if (i % 20 == 0)
        EXPECT_EQ(rank.buffers.download(rank.out), want);
      else
        rank.buffers.synchronize();
      check_cuda(cudaGraphExecDestroy(graph), "cudaGraphExecDestroy");
    }
    EXPECT_LE(used(), before + (std::size_t{64} << 20));
    communicator->barrier();
  });
}

/// Handles in memory of the caller's allocator: no graph holds them, and they come from there
/// alone.
TEST(Capture, HandlesLieWhereTheCallerWants) {
  with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
    Rank rank(communicator, workload());
    auto object = HighThroughput::create(communicator, options());
    rank.run(*object);
    const auto want = rank.buffers.download(rank.out);
    std::vector<std::weak_ptr<void>> given;
    const TensorView block = rank.buffers.make(DType::uint8, {1 << 20});
    const auto give = [&](const AllocationRequest& request) -> Allocation {
      EXPECT_EQ(request.name, "handle");
      EXPECT_LE(request.like.bytes(), block.bytes());
      auto owner = std::make_shared<int>(0);
      given.push_back(owner);
      return {block.data(), owner};
    };
    rank.allocator = Allocator::of(give);
    const cudaGraphExec_t graph = rank.capture(*object, cudaStreamCaptureModeThreadLocal);
    EXPECT_EQ(given.size(), 1U);
    for (const auto& owner : given) EXPECT_TRUE(owner.expired());
    communicator->barrier();
    rank.buffers.poison(rank.out);
    for (int replay = 0; replay < 3; ++replay)
      check_cuda(cudaGraphLaunch(graph, rank.buffers.stream()), "cudaGraphLaunch");
    EXPECT_EQ(rank.buffers.download(rank.out), want);
    cudaGraphExecDestroy(graph);
    communicator->barrier();
  });
}

/// While a graph lives its object's memory is not given back, here or at peers, so that a replay on
/// its way writes into nobody else's.
TEST(Capture, AnObjectMayGoWhileItsReplaysRun) {
  with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
    Rank rank(communicator, workload()), other(communicator, workload());
    const std::size_t before = communicator->arena().carved();
    auto object = HighThroughput::create(communicator, options());
    const std::size_t one = communicator->arena().carved() - before;
    cudaGraphExec_t graph = rank.capture(*object, cudaStreamCaptureModeThreadLocal);
    rank.run(*object);
    const auto want = rank.buffers.download(rank.out);
    communicator->barrier();
    rank.buffers.poison(rank.out);
    if (communicator->rank() == 1) std::this_thread::sleep_for(std::chrono::milliseconds(30));
    for (int replay = 0; replay < 200; ++replay)
      check_cuda(cudaGraphLaunch(graph, rank.buffers.stream()), "cudaGraphLaunch");
    object.reset();
    auto second = HighThroughput::create(communicator, options());
    EXPECT_EQ(communicator->arena().carved(), before + 2 * one);
    for (int i = 0; i < 20; ++i) other.run(*second);
    EXPECT_EQ(other.buffers.download(other.out), want);
    EXPECT_EQ(rank.buffers.download(rank.out), want);
    check_cuda(cudaGraphExecDestroy(graph), "cudaGraphExecDestroy");
    communicator->barrier();
    EXPECT_TRUE(comes_true([&] { return communicator->arena().carved() == before + one; }));
    communicator->barrier();
  });
}

/// A stream that is held up by the host until it is let go, or for five seconds.
struct Held {
  std::atomic<bool> held{true}, gave_up{false};
  explicit Held(cudaStream_t stream) {
    check_cuda(cudaLaunchHostFunc(
                   stream,
                   [](void* data) {
                     auto* self = static_cast<Held*>(data);
                     const auto most = Deadline::after(std::chrono::seconds(5));
                     while (self->held && !most.expired())
                       std::this_thread::sleep_for(std::chrono::milliseconds(1));
                     self->gave_up = self->held.load();
                   },
                   this),
               "cudaLaunchHostFunc");
  }
};

TEST(Capture, LaterCallsWithACapacityDoNotWait) {
  with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
    Rank rank(communicator, workload());
    auto object = HighThroughput::create(communicator, options());
    rank.run(*object);
    const auto want = rank.buffers.download(rank.out);
    cudaGraphExec_t graph = rank.capture(*object, cudaStreamCaptureModeThreadLocal);
    communicator->barrier();
    check_cuda(cudaGraphLaunch(graph, rank.buffers.stream()), "cudaGraphLaunch");
    rank.buffers.synchronize();
    rank.buffers.poison(rank.out);
    Held hold(rank.buffers.stream());
    rank.run(*object);  // returns although nothing before it has run
    EXPECT_FALSE(hold.gave_up);
    hold.held = false;
    EXPECT_EQ(rank.buffers.download(rank.out), want);
    EXPECT_FALSE(hold.gave_up);
    // Pool rows without counts are where the epoch says, which is asked for.
    auto pool = rank.request();
    pool.output = HighThroughput::Output::pool;
    pool.outputs = {};
    for (int i = 0; i < 3; ++i) {
      check_cuda(cudaGraphLaunch(graph, rank.buffers.stream()), "cudaGraphLaunch");
      const auto result = object->dispatch(pool);
      auto rows = rank.buffers.download(result.outputs.x);
      const auto owned = rank.buffers.download(rank.outputs.x);
      std::int32_t came = 0;
      rank.buffers.copy(&came, result.needed_rows.data(), 4);
      rank.buffers.synchronize();
      ASSERT_GT(came, 0);
      const auto bytes = static_cast<std::size_t>(came) * kShape.row_bytes();
      EXPECT_EQ(std::memcmp(rows.data(), owned.data(), bytes), 0);
      object->release(result.handle, rank.stream);
    }
    rank.buffers.synchronize();
    communicator->barrier();
    cudaGraphExecDestroy(graph);
  });
}

TEST(Capture, PoolRowsThatNobodyHoldsForbidNone) {
  with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
    Rank rank(communicator, workload());
    auto object = HighThroughput::create(communicator, options());
    auto pool = rank.request();
    pool.output = HighThroughput::Output::pool;
    pool.outputs = {};
    pool.capacity.reset();
    pool.stream = {};
    auto held = object->dispatch(pool);
    try {
      rank.capture(*object, cudaStreamCaptureModeThreadLocal);
      ADD_FAILURE();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::invalid_usage) << error.what();
    }
    held = {};
    cudaGraphExec_t graph = rank.capture(*object, cudaStreamCaptureModeThreadLocal);
    communicator->barrier();
    for (int replay = 0; replay < 5; ++replay)
      check_cuda(cudaGraphLaunch(graph, rank.buffers.stream()), "cudaGraphLaunch");
    const auto replayed = rank.buffers.download(rank.out);
    rank.run(*object);
    EXPECT_EQ(rank.buffers.download(rank.out), replayed);
    EXPECT_EQ(said(object->status()), "");
    communicator->barrier();
    cudaGraphExecDestroy(graph);
  });
}

/// PyTorch captures in the global mode: what any thread of the process then calls that a capture
/// does not allow would end it.
TEST(Capture, OfTheWholeProcessIsLeftInPeaceByOtherThreads) {
  with_thread_ranks(1, [&](const std::shared_ptr<Communicator>& communicator) {
    const Workload alone({kShape, 1, 5, RoutingPattern::parse("uniform")});
    Rank rank(communicator, alone);
    auto object = HighThroughput::create(communicator, options());
    auto beside = HighThroughput::create(communicator, options());
    rank.run(*object);
    const auto want = rank.buffers.download(rank.out);
    std::atomic<int> calls{0};
    std::string wrong;
    std::jthread busy([&](const std::stop_token& ending) {
      try {
        Rank mine(communicator, alone);
        while (!ending.stop_requested()) {
          auto eager = mine.request();
          eager.stream = {};
          eager.capacity.reset();
          eager.outputs = {};
          const auto result = beside->dispatch(eager);
          HighThroughput::CombineRequest combine;
          combine.y = result.outputs.x;
          combine.handle = result.handle;
          beside->combine(combine);
          if (said(beside->status()) != "") wrong = said(beside->status());
          ++calls;
        }
      } catch (const std::exception& error) {
        wrong = error.what();
      }
    });
    EXPECT_TRUE(comes_true([&] { return calls > 3 || !wrong.empty(); }));
    for (int i = 0; i < 30 && wrong.empty(); ++i) {
      cudaGraphExec_t graph = nullptr;
      ASSERT_TRUE(comes_true([&] {
        try {
          graph = rank.capture(*object, cudaStreamCaptureModeGlobal);
        } catch (const Error& error) {
          EXPECT_EQ(error.code(), ErrorCode::capacity) << error.what();
        }
        return graph != nullptr;
      }));
      rank.buffers.poison(rank.out);
      check_cuda(cudaGraphLaunch(graph, rank.buffers.stream()), "cudaGraphLaunch");
      EXPECT_EQ(rank.buffers.download(rank.out), want);
      cudaGraphExecDestroy(graph);
    }
    busy.request_stop();
    busy.join();
    EXPECT_EQ(wrong, "");
    EXPECT_GT(calls, 3);
  });
}

/// A call that is refused leaves the capture, and the object, as they were.
TEST(Capture, ARefusedCallChangesNothing) {
  with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
    Rank rank(communicator, workload());
    auto object = HighThroughput::create(communicator, options());
    rank.run(*object);
    const auto want = rank.buffers.download(rank.out);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    communicator->barrier();  // while one captures globally, others must not download
    check_cuda(cudaStreamBeginCapture(rank.buffers.stream(), cudaStreamCaptureModeGlobal), "begin");
    auto refused = [&](auto change) {
      auto bad = rank.request();
      change(bad);
      EXPECT_THROW(object->dispatch(bad), Error);
    };
    refused([](auto& r) { r.capacity.reset(), r.outputs = {}; });
    refused([](auto& r) { r.output = HighThroughput::Output::pool, r.outputs = {}; });
    refused([](auto& r) { r.x = {}; });
    rank.run(*object);
    check_cuda(cudaStreamEndCapture(rank.buffers.stream(), &graph), "cudaStreamEndCapture");
    communicator->barrier();
    check_cuda(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
    cudaGraphDestroy(graph);
    rank.buffers.poison(rank.out);
    check_cuda(cudaGraphLaunch(executable, rank.buffers.stream()), "cudaGraphLaunch");
    EXPECT_EQ(rank.buffers.download(rank.out), want);
    rank.run(*object);
    EXPECT_EQ(rank.buffers.download(rank.out), want);
    communicator->barrier();
    cudaGraphExecDestroy(executable);
  });
}

/// Graphs that combine in another order on one rank: every replay says on every rank what is wrong.
TEST(Capture, ReplaysThatDoNotBelongTogetherAreFound) {
  with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
    Rank rank(communicator, workload());
    auto wanted = options();
    auto object = HighThroughput::create(communicator, wanted);
    rank.run(*object);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    check_cuda(cudaStreamBeginCapture(rank.buffers.stream(), cudaStreamCaptureModeThreadLocal),
               "cudaStreamBeginCapture");
    const Handle first = object->dispatch(rank.request()).handle;
    const Handle second = object->dispatch(rank.request()).handle;
    HighThroughput::CombineRequest combine;
    combine.handle = communicator->rank() == 0 ? first : second;
    combine.y = rank.outputs.x;
    combine.out = rank.out;
    combine.stream = rank.stream;
    object->combine(combine);
    check_cuda(cudaStreamEndCapture(rank.buffers.stream(), &graph), "cudaStreamEndCapture");
    check_cuda(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
    cudaGraphDestroy(graph);
    communicator->barrier();
    check_cuda(cudaGraphLaunch(executable, rank.buffers.stream()), "cudaGraphLaunch");
    rank.buffers.synchronize();
    const std::string what = said(object->status());
    EXPECT_NE(what.find("at dispatch 2"), std::string::npos) << what;
    EXPECT_NE(what.find("at dispatch 3"), std::string::npos) << what;
    EXPECT_THROW(rank.run(*object), Error);
    cudaGraphExecDestroy(executable);
    communicator->barrier();
  });
}

/// A replay has nobody to throw to: status() says what went wrong in it, and whom it waited for.
TEST(Capture, StatusHasTheFailureOfAReplay) {
  CommunicatorOptions impatient = small_arena();
  impatient.timeout = std::chrono::milliseconds(300);
  std::atomic<bool> finished{false};
  with_thread_ranks(
      kRanks,
      [&](const std::shared_ptr<Communicator>& communicator) {
        Rank rank(communicator, workload());
        auto object = HighThroughput::create(communicator, options());
        cudaGraphExec_t graph = rank.capture(*object, cudaStreamCaptureModeThreadLocal);
        communicator->barrier();
        if (communicator->rank() == 0) {
          check_cuda(cudaGraphLaunch(graph, rank.buffers.stream()), "cudaGraphLaunch");
          rank.buffers.synchronize();
          const std::string what = said(object->status());
          EXPECT_NE(what.find("300 ms for rank 1"), std::string::npos) << what;
          EXPECT_EQ(object->status().error->peer(), 1);
          EXPECT_THROW(rank.run(*object), Error);
          finished = true;
        }
        comes_true([&] { return finished.load(); });
        cudaGraphExecDestroy(graph);
      },
      impatient);
}

}  // namespace
}  // namespace expertwire::test
