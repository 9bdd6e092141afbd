// Operations captured once and replayed ten thousand times with other routings, beside eager calls
// of another object that give what must come out.

#include <chrono>
#include <thread>

#include "gpu/buffers.hpp"
#include "ranks/thread_ranks.hpp"

namespace expertwire::test {
namespace {

using reference::RoutingPattern;
using reference::Workload;

constexpr int kRanks = 3, kSteps = 4, kReplays = 10000, kPairs = 3;
const MoeShape kShape{64, 12, 3, 24, DType::bf16};

/// Unequal, with a rank that has none.
int tokens_of(int rank) { return rank == 1 ? 0 : 24 - 5 * rank; }

/// One dispatch and combine whose experts do nothing; `out` is what came home.
template <class Object>
struct Pair;

template <>
struct Pair<LowLatency> {
  LowLatency::Outputs outputs;
  explicit Pair(Buffers& b)
      : outputs{b.make(kShape.dtype,
                       {kShape.experts / kRanks, kRanks * kShape.max_tokens, kShape.hidden}),
                b.make(DType::int32, {kShape.experts / kRanks}),
                b.make(DType::int32, {kShape.experts / kRanks, kRanks, 2}),
                b.make(DType::int32, {kShape.experts / kRanks, kRanks * kShape.max_tokens})} {}
  static std::unique_ptr<LowLatency> make(const std::shared_ptr<Communicator>& communicator) {
    LowLatencyOptions options{kShape};
    options.sms = 8;
    return LowLatency::create(communicator, options);
  }
  void run(LowLatency& object, const StepInputs& in, const TensorView& out,
           const Stream& stream) const {
    LowLatency::DispatchRequest dispatch;
    dispatch.x = in.x;
    dispatch.topk_idx = in.topk_idx;
    dispatch.topk_weights = in.topk_weights;
    dispatch.outputs = outputs;
    dispatch.stream = stream;
    LowLatency::CombineRequest combine;
    combine.handle = object.dispatch(dispatch).handle;
    combine.y = outputs.x;
    combine.out = out;
    combine.stream = stream;
    object.combine(combine);
  }
};

template <>
struct Pair<HighThroughput> {
  static constexpr std::int64_t kRows = kRanks * 24;
  HighThroughput::Outputs outputs;
  explicit Pair(Buffers& b)
      : outputs{b.make(kShape.dtype, {kRows, kShape.hidden}), b.make(DType::int32, {kRows}),
                b.make(DType::int32, {kRows, kShape.top_k}),
                b.make(DType::fp32, {kRows, kShape.top_k})} {}
  static std::unique_ptr<HighThroughput> make(const std::shared_ptr<Communicator>& communicator) {
    HighThroughputOptions options{kShape};
    options.sms = 8;
    return HighThroughput::create(communicator, options);
  }
  void run(HighThroughput& object, const StepInputs& in, const TensorView& out,
           const Stream& stream) const {
    HighThroughput::DispatchRequest dispatch;
    dispatch.x = in.x;
    dispatch.topk_idx = in.topk_idx;
    dispatch.topk_weights = in.topk_weights;
    dispatch.capacity = kRows;
    dispatch.outputs = outputs;
    dispatch.stream = stream;
    HighThroughput::CombineRequest combine;
    combine.handle = object.dispatch(dispatch).handle;
    combine.y = outputs.x;
    combine.out = out;
    combine.stream = stream;
    object.combine(combine);
  }
};

/// High throughput whose rows are grouped by expert.
struct Grouped {};

template <>
struct Pair<Grouped> {
  static constexpr std::int64_t kRows = kRanks * 24 * 3;
  HighThroughput::Outputs outputs;
  explicit Pair(Buffers& b)
      : outputs{b.make(kShape.dtype, {kRows, kShape.hidden}), b.make(DType::int32, {kRows}),
                b.make(DType::int32, {kRows}), b.make(DType::fp32, {kRows})} {}
  static std::unique_ptr<HighThroughput> make(const std::shared_ptr<Communicator>& communicator) {
    return Pair<HighThroughput>::make(communicator);
  }
  void run(HighThroughput& object, const StepInputs& in, const TensorView& out,
           const Stream& stream) const {
    HighThroughput::DispatchRequest dispatch;
    dispatch.x = in.x;
    dispatch.topk_idx = in.topk_idx;
    dispatch.topk_weights = in.topk_weights;
    dispatch.layout = HighThroughput::Layout::expert_major;
    dispatch.expert_alignment = 8;
    dispatch.capacity = kRows;
    dispatch.outputs = outputs;
    dispatch.stream = stream;
    HighThroughput::CombineRequest combine;
    combine.handle = object.dispatch(dispatch).handle;
    combine.y = outputs.x;
    combine.row_weights = outputs.topk_weights;
    combine.out = out;
    combine.stream = stream;
    object.combine(combine);
  }
};

template <class Mode>
class Graph : public testing::Test {};
using Modes = testing::Types<LowLatency, HighThroughput, Grouped>;
TYPED_TEST_SUITE(Graph, Modes);

/// Captures kPairs pairs (an odd number of operations each way).
template <class Object, class Mode>
cudaGraphExec_t capture(Object& object, const Pair<Mode>& pair, const StepInputs& in,
                        const TensorView& out, const Buffers& buffers) {
  Stream stream = Stream::cuda(buffers.stream());
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check_cuda(cudaStreamBeginCapture(buffers.stream(), cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < kPairs; ++i) pair.run(object, in, out, stream);
  check_cuda(cudaStreamEndCapture(buffers.stream(), &graph), "cudaStreamEndCapture");
  check_cuda(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  cudaGraphDestroy(graph);
  return executable;
}

TYPED_TEST(Graph, ReplaysWithOtherRoutings) {
  std::atomic<int> wrong{0}, replays{0};
  with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
    const int rank = communicator->rank(), tokens = tokens_of(rank);
    const Workload workload({kShape, kRanks, 5, RoutingPattern::parse("masked:0.3")});
    Buffers buffers(communicator->cuda_device());
    const Pair<TypeParam> pair(buffers);
    const StepInputs in(buffers, kShape, tokens);
    const TensorView out = buffers.make(kShape.dtype, {tokens, kShape.hidden});
    auto eager = Pair<TypeParam>::make(communicator),
         captured = Pair<TypeParam>::make(communicator);

    std::vector<StepInputs> inputs;
    std::vector<std::vector<std::byte>> wanted;
    for (int step = 0; step < kSteps; ++step) {
      inputs.emplace_back(buffers, kShape, tokens);
      inputs.back().fill(buffers, workload.input(rank, step));
      buffers.synchronize();
      pair.run(*eager, inputs.back(), out, {});
      wanted.push_back(buffers.download(out));
    }
    cudaGraphExec_t graph = capture(*captured, pair, in, out, buffers);
    for (int replay = 0; replay < kReplays; ++replay) {
      const auto step = static_cast<std::size_t>((replay * 7 + replay / 11) % kSteps);
      if (replay % 1000 == 17 && rank == 2)
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
      buffers.copy(in.x.data(), inputs[step].x.data(), in.x.bytes());
      buffers.copy(in.topk_idx.data(), inputs[step].topk_idx.data(), in.topk_idx.bytes());
      buffers.copy(in.topk_weights.data(), inputs[step].topk_weights.data(),
                   in.topk_weights.bytes());
      buffers.poison(out);
      check_cuda(cudaGraphLaunch(graph, buffers.stream()), "cudaGraphLaunch");
      if (buffers.download(out) != wanted[step]) ++wrong;
      ++replays;
    }
    // Eager calls go on where the replays ended.
    inputs[1].fill(buffers, workload.input(rank, 1));
    buffers.synchronize();
    pair.run(*captured, inputs[1], out, {});
    if (buffers.download(out) != wanted[1]) ++wrong;
    EXPECT_EQ(said(captured->status()), "");
    communicator->barrier();
    cudaGraphExecDestroy(graph);
  });
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(replays, kRanks * kReplays);
}

/// Two objects on two streams, with half of the SMs each, in several orders.
TYPED_TEST(Graph, TwoObjectsInFlight) {
  std::atomic<int> wrong{0};
  with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
    const int rank = communicator->rank(), tokens = tokens_of(rank);
    const Workload workload({kShape, kRanks, 6, RoutingPattern::parse("uniform")});
    Buffers a(communicator->cuda_device()), b(communicator->cuda_device());
    const Stream on_a = Stream::cuda(a.stream()), on_b = Stream::cuda(b.stream());
    const Pair<TypeParam> pair_a(a), pair_b(b);
    auto first = Pair<TypeParam>::make(communicator), second = Pair<TypeParam>::make(communicator);
    const StepInputs in_a(a, kShape, tokens), in_b(b, kShape, tokens);
    const TensorView out_a = a.make(kShape.dtype, {tokens, kShape.hidden}),
                     out_b = b.make(kShape.dtype, {tokens, kShape.hidden});
    in_a.fill(a, workload.input(rank, 0));
    in_b.fill(b, workload.input(rank, 1));
    pair_a.run(*first, in_a, out_a, on_a);
    const auto want_a = a.download(out_a);
    pair_b.run(*second, in_b, out_b, on_b);
    const auto want_b = b.download(out_b);
    for (int round = 0; round < 300; ++round) {
      a.poison(out_a);
      b.poison(out_b);
      if (round % 3 == 0) {
        pair_a.run(*first, in_a, out_a, on_a);
        pair_b.run(*second, in_b, out_b, on_b);
      } else if (round % 3 == 1) {
        pair_b.run(*second, in_b, out_b, on_b);
        pair_a.run(*first, in_a, out_a, on_a);
      } else {  // both objects on both streams
        pair_a.run(*first, in_a, out_a, on_a);
        a.synchronize();
        pair_b.run(*second, in_b, out_b, on_a);
        pair_a.run(*first, in_a, out_a, on_b);
      }
      a.synchronize();
      b.synchronize();
      if (a.download(out_a) != want_a || b.download(out_b) != want_b) ++wrong;
    }
  });
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace expertwire::test
