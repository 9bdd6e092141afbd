#include "bench_cuda.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <utility>

#include "base/device_tensors.hpp"
#include "comm/shared_block.hpp"
#include "device/limits.hpp"

namespace expertwire::tools {

namespace {

using reference::RankInput;
using Weights = reference::RoundTripOptions::Weights;

class Event {
 public:
  Event() { check_cuda(cudaEventCreate(&event_), "cudaEventCreate"); }
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  ~Event() {
    if (event_ != nullptr) cudaEventDestroy(event_);
  }
  void record(cudaStream_t stream) {
    check_cuda(cudaEventRecord(event_, stream), "cudaEventRecord");
  }
  double us_since(const Event& start) const {
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, start.event_, event_), "cudaEventElapsedTime");
    return static_cast<double>(ms) * 1e3;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

/// Inputs of all steps on the device.
struct Inputs {
  struct Step {
    ConstTensorView x, topk_idx, topk_weights;
  };
  std::vector<Step> steps;

  Inputs(DeviceTensors& device, const Steps& host, const MoeShape& shape) {
    for (const RankInput& input : host.inputs) {
      const std::int64_t tokens = input.tokens;
      steps.push_back(
          {device.upload(input.x.data(), shape.dtype, {tokens, shape.hidden}),
           device.upload(input.topk_idx.data(), DType::int64, {tokens, shape.top_k}),
           device.upload(input.topk_weights.data(), DType::fp32, {tokens, shape.top_k})});
    }
  }
  const Step& at(int i) const { return steps[static_cast<std::size_t>(i) % steps.size()]; }
};

/// The pair of one step, on a stream or (null) to its end.
class Pair {
 public:
  Pair() = default;
  Pair(const Pair&) = delete;
  Pair& operator=(const Pair&) = delete;
  virtual ~Pair() = default;
  virtual void dispatch(int step, Stream* stream) = 0;
  virtual void combine(int step, Stream* stream) = 0;
};

/// Times the pair as an eager caller sees it, on a stream without waiting, and in a graph.
void time_pair(Communicator& communicator, const BenchOptions& options, DeviceTensors& device,
               Pair& pair, Measurement& result) {
  const int total = options.warmup + options.iterations;
  communicator.barrier();
  for (int i = 0; i < total; ++i) {
    const double start = now_us();
    pair.dispatch(i, nullptr);
    const double middle = now_us();
    pair.combine(i, nullptr);
    const double end = now_us();
    if (i < options.warmup) continue;
    result.timings.dispatch.push_back(middle - start);
    result.timings.combine.push_back(end - middle);
  }

  Stream stream{CudaStream{device.stream()}};
  std::vector<Event> events(2 * static_cast<std::size_t>(total) + 1);
  communicator.barrier();
  events[0].record(device.stream());
  for (int i = 0; i < total; ++i) {
    const auto at = static_cast<std::size_t>(i);
    pair.dispatch(i, &stream);
    events[2 * at + 1].record(device.stream());
    pair.combine(i, &stream);
    events[2 * at + 2].record(device.stream());
  }
  device.synchronize();
  for (auto i = static_cast<std::size_t>(options.warmup); i < static_cast<std::size_t>(total);
       ++i) {
    result.stream.dispatch.push_back(events[2 * i + 1].us_since(events[2 * i]));
    result.stream.combine.push_back(events[2 * i + 2].us_since(events[2 * i + 1]));
  }
}

/// Back-to-back period of a pair in a graph of several.
void time_graph(Communicator& communicator, const BenchOptions& options, DeviceTensors& device,
                Pair& pair, Measurement& result) {
  constexpr int kPairs = 5, kReplays = 20;
  Stream stream{CudaStream{device.stream()}};
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check_cuda(cudaStreamBeginCapture(device.stream(), cudaStreamCaptureModeThreadLocal),
             "cudaStreamBeginCapture");
  for (int i = 0; i < kPairs; ++i) {
    pair.dispatch(i, &stream);
    pair.combine(i, &stream);
  }
  check_cuda(cudaStreamEndCapture(device.stream(), &graph), "cudaStreamEndCapture");
  check_cuda(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  communicator.barrier();
  for (int round = 0; round < std::max(3, options.iterations / 10); ++round) {
    Event start, end;
    start.record(device.stream());
    for (int i = 0; i < kReplays; ++i)
      check_cuda(cudaGraphLaunch(executable, device.stream()), "cudaGraphLaunch");
    end.record(device.stream());
    device.synchronize();
    if (round > 0) result.graph_pair.push_back(end.us_since(start) / (kReplays * kPairs));
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
}

/// Microseconds to store the wire bytes of an operation to all peers at once, with no protocol.
double time_burst(const std::shared_ptr<Communicator>& communicator, DeviceTensors& device,
                  double wire_bytes, int blocks) {
  const int peers = communicator->size() - 1;
  if (peers == 0 || peers > StoreAllParams::kMostPeers) return 0;
  const auto bytes = static_cast<std::size_t>(wire_bytes / peers) / 16 * 16;
  const SharedBlock block(communicator, bytes * static_cast<std::size_t>(peers));
  StoreAllParams params{};
  params.source = device.make(DType::uint8, {static_cast<std::int64_t>(bytes)}).data();
  params.bytes_per_peer = bytes;
  params.count = peers;
  const int rank = communicator->rank(), size = communicator->size();
  for (int i = 0; i < peers; ++i) {
    const int peer = (rank + 1 + i) % size;
    const int part = (rank - peer + size) % size - 1;  // this rank's among the writers to that peer
    params.peers[i] = block.base(peer) + bytes * static_cast<std::size_t>(part);
  }
  std::vector<double> times;
  communicator->barrier();
  for (int i = 0; i < 30; ++i) {
    Event start, end;
    start.record(device.stream());
    for (int j = 0; j < 4; ++j)
      check_cuda(launch_store_all(params, blocks, device.stream()), "launch of store_all");
    end.record(device.stream());
    device.synchronize();
    times.push_back(end.us_since(start) / 4);
  }
  communicator->barrier();
  std::nth_element(times.begin(), times.begin() + 15, times.end());
  return times[15];
}

int sms_of(const Communicator& communicator, const BenchOptions& options) {
  int sms = 0;
  check_cuda(
      cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, communicator.cuda_device()),
      "cudaDeviceGetAttribute");
  sms /= communicator.topology().ranks_on_gpu(communicator.rank());
  return options.sms > 0 ? std::min(options.sms, sms) : sms;
}

// Low latency ------------------------------------------------------------------------------------

class LowLatencyPair final : public Pair {
 public:
  LowLatencyPair(LowLatency& object, DeviceTensors& device, const Inputs& inputs,
                 const BenchOptions& options, int ranks)
      : object_(object), inputs_(inputs), options_(options) {
    const MoeShape& shape = options.shape;
    const std::int64_t local = shape.experts / ranks;
    const std::int64_t rows = static_cast<std::int64_t>(ranks) * shape.max_tokens;
    for (LowLatency::Outputs& o : outputs_)
      o = {device.make(shape.dtype, {local, rows, shape.hidden}),
           device.make(DType::int32, {local}), device.make(DType::int32, {local, ranks, 2}),
           device.make(DType::int32, {local, rows})};
    out_ = device.make(shape.dtype, {shape.max_tokens, shape.hidden});
  }
  void dispatch(int step, Stream* stream) override {
    const Inputs::Step& input = inputs_.at(step);
    LowLatency::DispatchRequest request;
    request.x = input.x;
    request.topk_idx = input.topk_idx;
    if (options_.weights == Weights::dispatch) request.topk_weights = input.topk_weights;
    request.outputs = outputs_[static_cast<std::size_t>(step) % outputs_.size()];
    request.stream = stream;
    handle_ = object_.dispatch(request).handle;
  }
  void combine(int step, Stream* stream) override {
    LowLatency::CombineRequest request;
    request.y = outputs_[static_cast<std::size_t>(step) % outputs_.size()].x;
    request.handle = handle_;
    if (options_.weights == Weights::combine) request.topk_weights = inputs_.at(step).topk_weights;
    request.out = {out_.data(), out_.dtype(), {inputs_.at(step).x.size(0), out_.size(1)}};
    request.stream = stream;
    object_.combine(request);
  }

 private:
  LowLatency& object_;
  const Inputs& inputs_;
  const BenchOptions& options_;
  std::array<LowLatency::Outputs, 2> outputs_;
  TensorView out_;
  Handle handle_;
};

// High throughput --------------------------------------------------------------------------------

class HighThroughputPair final : public Pair {
 public:
  HighThroughputPair(HighThroughput& object, DeviceTensors& device, const Inputs& inputs,
                     const BenchOptions& options, int ranks)
      : object_(object), inputs_(inputs), options_(options) {
    const MoeShape& shape = options.shape;
    capacity_ = static_cast<std::int64_t>(ranks) * shape.max_tokens;
    out_ = device.make(shape.dtype, {shape.max_tokens, shape.hidden});
    if (options.output == HighThroughput::Output::pool) return;
    outputs_ = {device.make(shape.dtype, {capacity_, shape.hidden}),
                device.make(DType::int32, {capacity_}),
                device.make(DType::int32, {capacity_, shape.top_k}),
                device.make(DType::fp32, {capacity_, shape.top_k})};
  }
  /// Eager calls learn the counts; others have a capacity, so that no host waits.
  void dispatch(int step, Stream* stream) override {
    const Inputs::Step& input = inputs_.at(step);
    HighThroughput::DispatchRequest request;
    request.x = input.x;
    request.topk_idx = input.topk_idx;
    if (options_.weights == Weights::dispatch) request.topk_weights = input.topk_weights;
    request.output = options_.output;
    request.stream = stream;
    if (stream != nullptr) request.capacity = capacity_;
    if (stream != nullptr && outputs_.x.present()) request.outputs = outputs_;
    request.allocator = [this](const AllocationRequest& r) -> Allocation {
      if (r.name == "x") return {outputs_.x.data(), nullptr};
      if (r.name == "source_tokens") return {outputs_.source_tokens.data(), nullptr};
      if (r.name == "topk_experts") return {outputs_.topk_experts.data(), nullptr};
      return {outputs_.topk_weights.data(), nullptr};
    };
    result_ = object_.dispatch(request);
  }
  void combine(int step, Stream* stream) override {
    HighThroughput::CombineRequest request;
    request.y = result_.outputs.x;
    request.handle = result_.handle;
    request.out = {out_.data(), out_.dtype(), {inputs_.at(step).x.size(0), out_.size(1)}};
    request.stream = stream;
    object_.combine(request);
  }

 private:
  HighThroughput& object_;
  const Inputs& inputs_;
  const BenchOptions& options_;
  std::int64_t capacity_ = 0;
  HighThroughput::Outputs outputs_;
  TensorView out_;
  HighThroughput::DispatchResult result_;
};

/// The course of a bench, the same in both modes: verify `checks` steps, then time a `PairOf` on an
/// object of the mode.
template <class Object, class PairOf, class Options>
Measurement run(const std::shared_ptr<Communicator>& communicator, const BenchOptions& options,
                const reference::RoundTripOptions& check, int checks, bool graph) {
  const reference::Workload workload({options.shape, communicator->size(), options.seed,
                                      reference::RoutingPattern::parse(options.routing)});
  const Steps steps = make_steps(workload, communicator->rank());
  Measurement result = start_measurement(*communicator, steps, options);
  result.sms = sms_of(*communicator, options);
  Options object_options{options.shape, options.lanes};
  object_options.sms = result.sms;
  object_options.handles = 16;
  auto object = Object::create(communicator, object_options);
  result.arena_bytes = Object::memory_bytes(object_options, communicator->size());
  for (int step = 0; options.verify && step < checks; ++step)
    result.report += round_trip(*object, *communicator, workload, step, check);
  DeviceTensors device(communicator->cuda_device());
  const Inputs inputs(device, steps, options.shape);
  PairOf pair(*object, device, inputs, options, communicator->size());
  time_pair(*communicator, options, device, pair, result);
  if (graph) time_graph(*communicator, options, device, pair, result);
  const double wire = steps.traffic.wire * static_cast<double>(options.shape.row_bytes());
  result.burst_us = time_burst(communicator, device, wire, result.sms);
  return result;
}

}  // namespace

Measurement bench_cuda_low_latency(const std::shared_ptr<Communicator>& communicator,
                                   const BenchOptions& options) {
  reference::RoundTripOptions check;
  check.weights = options.weights;
  return run<LowLatency, LowLatencyPair, LowLatencyOptions>(communicator, options, check, 2, true);
}

Measurement bench_cuda_high_throughput(const std::shared_ptr<Communicator>& communicator,
                                       const BenchOptions& options) {
  const bool pool = options.output == HighThroughput::Output::pool;
  reference::RoundTripOptions check;
  check.weights = options.weights;
  check.output = options.output;
  check.in_place = pool;
  // Pool output is not captured: its slots alternate from one replay to the next.
  return run<HighThroughput, HighThroughputPair, HighThroughputOptions>(communicator, options,
                                                                        check, 1, !pool);
}

}  // namespace expertwire::tools
