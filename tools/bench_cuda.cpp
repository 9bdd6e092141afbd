#include "bench_cuda.hpp"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <utility>

#include "base/cuda_event.hpp"
#include "base/device_tensors.hpp"
#include "comm/communicator_access.hpp"
#include "comm/shared_block.hpp"
#include "device/limits.hpp"
#include "device/spin.hpp"
#include "ep/cuda/runtime/trace.hpp"
#include "ep/protocol/row_format.hpp"
#include "nccl_peer.hpp"

namespace expertwire::tools {

namespace {

using reference::RankInput;
using Weights = reference::RoundTripOptions::Weights;

/// Inputs of all steps on the device.
struct Inputs {
  struct Step {
    ConstTensorView x, x_scales, topk_idx, topk_weights;
  };
  std::vector<Step> steps;

  Inputs(DeviceTensors& device, const Steps& host, const MoeShape& shape, bool fp8) {
    for (const RankInput& input : host.inputs) {
      const std::int64_t tokens = input.tokens;
      Step step;
      // What the codes are does not matter for time, so the first bytes of the rows will do.
      step.x = device.upload(input.x.data(), fp8 ? DType::fp8_e4m3 : shape.dtype,
                             {tokens, shape.hidden});
      if (fp8) step.x_scales = device.make(DType::fp32, {tokens, ep::scales_of(shape.hidden)});
      step.topk_idx = device.upload(input.topk_idx.data(), DType::int64, {tokens, shape.top_k});
      step.topk_weights =
          device.upload(input.topk_weights.data(), DType::fp32, {tokens, shape.top_k});
      steps.push_back(step);
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
  virtual void dispatch(int step, const Stream& stream) = 0;
  virtual void combine(int step, const Stream& stream) = 0;
};

/// Times the pair as an eager caller sees it, on a stream without waiting, and in a graph.
void time_pair(Communicator& communicator, const BenchOptions& options, DeviceTensors& device,
               Pair& pair, Measurement& result) {
  const int total = options.warmup + options.iterations;
  communicator.barrier();
  for (int i = 0; i < total; ++i) {
    const double start = now_us();
    pair.dispatch(i, {});
    const double middle = now_us();
    pair.combine(i, {});
    const double end = now_us();
    if (i < options.warmup) continue;
    result.timings.dispatch.push_back(middle - start);
    result.timings.combine.push_back(end - middle);
  }

  Stream stream = Stream::cuda(device.stream());
  std::vector<CudaEvent> events(2 * static_cast<std::size_t>(total) + 1);
  communicator.barrier();
  events[0].record(device.stream());
  for (int i = 0; i < total; ++i) {
    const auto at = static_cast<std::size_t>(i);
    pair.dispatch(i, stream);
    events[2 * at + 1].record(device.stream());
    pair.combine(i, stream);
    events[2 * at + 2].record(device.stream());
  }
  device.synchronize();
  for (auto i = static_cast<std::size_t>(options.warmup); i < static_cast<std::size_t>(total);
       ++i) {
    result.stream.dispatch.push_back(events[2 * i + 1].us_since(events[2 * i]));
    result.stream.combine.push_back(events[2 * i + 2].us_since(events[2 * i + 1]));
  }
}

/// Pairs of different steps, captured once.
class PairGraph {
 public:
  PairGraph(DeviceTensors& device, Pair& pair, int pairs) : device_(device) {
    Stream stream = Stream::cuda(device.stream());
    cudaGraph_t graph = nullptr;
    check_cuda(cudaStreamBeginCapture(device.stream(), cudaStreamCaptureModeThreadLocal),
               "cudaStreamBeginCapture");
    for (int i = 0; i < pairs; ++i) {
      pair.dispatch(i, stream);
      pair.combine(i, stream);
    }
    check_cuda(cudaStreamEndCapture(device.stream(), &graph), "cudaStreamEndCapture");
    check_cuda(cudaGraphInstantiate(&executable_, graph, 0), "cudaGraphInstantiate");
    cudaGraphDestroy(graph);
  }
  PairGraph(const PairGraph&) = delete;
  PairGraph& operator=(const PairGraph&) = delete;
  ~PairGraph() { cudaGraphExecDestroy(executable_); }
  void launch() const {
    check_cuda(cudaGraphLaunch(executable_, device_.stream()), "cudaGraphLaunch");
  }

 private:
  DeviceTensors& device_;
  cudaGraphExec_t executable_ = nullptr;
};

constexpr int kPairsOfGraph = 5;

/// Back-to-back period of a pair in a graph of several.
void time_graph(Communicator& communicator, const BenchOptions& options, DeviceTensors& device,
                Pair& pair, Measurement& result) {
  constexpr int kReplays = 20;
  const PairGraph graph(device, pair, kPairsOfGraph);
  communicator.barrier();
  for (int round = 0; round < std::max(3, options.iterations / 10); ++round) {
    CudaEvent start, end;
    start.record(device.stream());
    for (int i = 0; i < kReplays; ++i) graph.launch();
    end.record(device.stream());
    device.synchronize();
    if (round > 0) result.graph_pair.push_back(end.us_since(start) / (kReplays * kPairsOfGraph));
  }
}

/// Moments of one operation, averaged; a line a kernel.
std::vector<std::string> describe_moments(const std::string& operation,
                                          const std::vector<ep::cuda::OperationTimes>& all) {
  static constexpr const char* kNames[] = {"started", "admitted", "sent",
                                           "counted", "received", "ended"};
  std::vector<std::string> lines;
  for (std::size_t kernel = 0;; ++kernel) {
    std::string text;
    for (std::size_t mark = 0; mark < ep::cuda::kMarks; ++mark) {
      double first = 0, mean = 0, last = 0, count = 0;
      for (const auto& times : all) {
        if (times.operation != operation || kernel >= times.kernels.size()) continue;
        const auto& moment = times.kernels[kernel][mark];
        if (moment.last == 0 && mark > 0) continue;
        first += moment.first;
        mean += moment.mean;
        last += moment.last;
        ++count;
      }
      if (count > 0)
        text += fmt::format(" {} {:.1f} {:.1f} {:.1f};", kNames[mark], first / count, mean / count,
                            last / count);
    }
    if (text.empty()) return lines;
    lines.push_back(fmt::format("{}, kernel {}, us after the start (first block, mean, last):{}",
                                operation, kernel + 1, text));
  }
}

/// Kernel spans by the device's clock; in a graph, where the pair can be captured, so that no
/// rank's host holds up the others. The first pair of a replay does not count: in it kernels wait
/// for whichever host launches last.
void time_kernels(Communicator& communicator, const BenchOptions& options, DeviceTensors& device,
                  Pair& pair, bool graph, Measurement& result) {
  constexpr int kMostLaunches = 3;  // of a pair
  ep::cuda::Trace trace(communicator.cuda_device(),
                        kMostLaunches * std::max(kPairsOfGraph, options.iterations));
  std::vector<ep::cuda::OperationTimes> all;
  auto take = [&](std::size_t skipped) {
    device.synchronize();
    const auto times = trace.read();
    all.insert(all.end(), times.begin() + static_cast<std::ptrdiff_t>(2 * skipped), times.end());
  };
  if (graph) {
    const PairGraph captured(device, pair, kPairsOfGraph);
    trace.read();
    for (int pairs = 0; pairs <= options.iterations; pairs += kPairsOfGraph - 1) {
      communicator.barrier();
      captured.launch();
      take(pairs == 0 ? kPairsOfGraph : 1);  // of the first replay, none counts
    }
  } else {
    Stream stream = Stream::cuda(device.stream());
    communicator.barrier();
    for (int i = 0; i < options.iterations; ++i) {
      pair.dispatch(i, stream);
      pair.combine(i, stream);
    }
    take(0);
  }
  for (std::size_t i = 0; i + 1 < all.size(); i += 2) {
    result.kernel.dispatch.push_back(all[i].span_us);
    result.kernel.combine.push_back(all[i + 1].span_us);
  }
  if (!options.trace || all.size() < 2) return;
  for (std::size_t i = 0; i < 2; ++i)
    for (std::string& line : describe_moments(all[i].operation, all))
      result.moments.push_back(std::move(line));
}

/// A pair whose rank comes late to each operation: its stream is held up before.
class LatePair final : public Pair {
 public:
  LatePair(Pair& pair, double late_us)
      : pair_(pair), ns_(static_cast<std::uint64_t>(late_us * 1e3)) {}
  void dispatch(int step, const Stream& stream) override {
    hold_up(stream);
    pair_.dispatch(step, stream);
  }
  void combine(int step, const Stream& stream) override {
    hold_up(stream);
    pair_.combine(step, stream);
  }

 private:
  void hold_up(const Stream& stream) const {
    check_cuda(launch_spin(ns_, static_cast<cudaStream_t>(stream.cuda_handle())), "launch of spin");
  }

  Pair& pair_;
  std::uint64_t ns_;
};

/// Kernel spans where one rank is late; of use on the others.
Timings time_late(Communicator& communicator, const BenchOptions& options, DeviceTensors& device,
                  Pair& pair) {
  BenchOptions plain = options;
  plain.trace = false;
  LatePair late(pair, options.late_us);
  Measurement result;
  time_kernels(communicator, plain, device,
               communicator.rank() == kLateRank ? static_cast<Pair&>(late) : pair, false, result);
  return result.kernel;
}

bool has_bulk_copies(int device) {
  int major = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
             "cudaDeviceGetAttribute");
  return major >= 9;
}

/// Microseconds to store the wire bytes of an operation to all peers at once, with no protocol: the
/// better of plain stores and bulk copies.
double time_burst(const std::shared_ptr<Communicator>& communicator, double wire_bytes,
                  int blocks) {
  DeviceTensors device(communicator->cuda_device());
  const int peers = communicator->size() - 1;
  if (peers == 0 || peers > StoreAllParams::kMostPeers) return 0;
  const auto bytes = static_cast<std::size_t>(wire_bytes / peers) / 16 * 16;
  const auto is_staged = [&](int peer) {
    return communicator->path(peer).kind == PathKind::staged;
  };
  bool staged = false;
  for (int peer = 0; peer <= peers; ++peer) staged = staged || is_staged(peer);
  const std::size_t whole = bytes * static_cast<std::size_t>(peers);
  const SharedBlock block(communicator, whole, staged ? whole : 0);
  StoreAllParams params{};
  params.source = device.make(DType::uint8, {static_cast<std::int64_t>(bytes)}).data();
  params.bytes_per_peer = bytes;
  params.count = peers;
  const int rank = communicator->rank(), size = communicator->size();
  for (int i = 0; i < peers; ++i) {
    const int peer = (rank + 1 + i) % size;
    const int part = (rank - peer + size) % size - 1;  // this rank's among the writers to that peer
    const std::size_t offset = bytes * static_cast<std::size_t>(part);
    params.peers[i] =
        is_staged(peer) ? block.staged(peer, offset, bytes) : block.base(peer) + offset;
  }
  auto median = [&](auto launch) {
    std::vector<double> times;
    communicator->barrier();
    for (int i = 0; i < 30; ++i) {
      CudaEvent start, end;
      start.record(device.stream());
      for (int j = 0; j < 4; ++j)
        check_cuda(launch(params, blocks, device.stream()), "launch of a burst");
      end.record(device.stream());
      device.synchronize();
      times.push_back(end.us_since(start) / 4);
    }
    communicator->barrier();
    std::nth_element(times.begin(), times.begin() + 15, times.end());
    return times[15];
  };
  const double plain = median(launch_store_all);
  return has_bulk_copies(communicator->cuda_device())
             ? std::min(plain, median(launch_bulk_store_all))
             : plain;
}

/// SMs of a rank, at most `asked` if that is not 0.
int sms_of(const Communicator& communicator, int asked) {
  int sms = 0;
  check_cuda(
      cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, communicator.cuda_device()),
      "cudaDeviceGetAttribute");
  sms /= communicator.topology().ranks_on_gpu(communicator.rank());
  return asked > 0 ? std::min(asked, sms) : sms;
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
    for (LowLatency::Outputs& o : outputs_) {
      y_.push_back(device.make(shape.dtype, {local, rows, shape.hidden}));
      o = {y_.back(), device.make(DType::int32, {local}),
           device.make(DType::int32, {local, ranks, 2}), device.make(DType::int32, {local, rows})};
      if (!options.fp8) continue;
      o.x = device.make(DType::fp8_e4m3, {local, rows, shape.hidden});
      o.scales = device.make(DType::fp32, {local, rows, ep::scales_of(shape.hidden)});
    }
    out_ = device.make(shape.dtype, {shape.max_tokens, shape.hidden});
  }
  void dispatch(int step, const Stream& stream) override {
    const Inputs::Step& input = inputs_.at(step);
    LowLatency::DispatchRequest request;
    request.x = input.x;
    request.topk_idx = input.topk_idx;
    if (options_.weights == Weights::dispatch) request.topk_weights = input.topk_weights;
    request.cast_to_fp8 = options_.fp8;
    request.outputs = outputs_[static_cast<std::size_t>(step) % outputs_.size()];
    request.stream = stream;
    handle_ = object_.dispatch(request).handle;
  }
  void combine(int step, const Stream& stream) override {
    LowLatency::CombineRequest request;
    request.y = y_[static_cast<std::size_t>(step) % y_.size()];
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
  std::vector<TensorView> y_;  // the outputs' x, or beside it where that is fp8
  TensorView out_;
  Handle handle_;
};

// High throughput --------------------------------------------------------------------------------

class HighThroughputPair final : public Pair {
 public:
  HighThroughputPair(HighThroughput& object, DeviceTensors& device, const Inputs& inputs,
                     const BenchOptions& options, int ranks)
      : object_(object), device_(device), inputs_(inputs), options_(options) {
    const MoeShape& shape = options.shape;
    capacity_ = options.most_rows(ranks);
    out_ = device.make(shape.dtype, {shape.max_tokens, shape.hidden});
    if (options.output == HighThroughput::Output::pool) return;
    y_ = device.make(shape.dtype, {capacity_, shape.hidden});
    const auto per_row = [&](DType dtype) {
      return options.grouped() ? device.make(dtype, {capacity_})
                               : device.make(dtype, {capacity_, shape.top_k});
    };
    outputs_ = {y_, device.make(DType::int32, {capacity_}), per_row(DType::int32),
                per_row(DType::fp32)};
    if (!options.fp8) return;
    outputs_.x = device.make(DType::fp8_e4m3, {capacity_, shape.hidden});
    outputs_.scales = device.make(DType::fp32, {capacity_, ep::scales_of(shape.hidden)});
  }
  /// Eager calls learn the counts; others have a capacity, so that no host waits.
  void dispatch(int step, const Stream& stream) override {
    const Inputs::Step& input = inputs_.at(step);
    HighThroughput::DispatchRequest request;
    request.x = input.x;
    request.x_scales = input.x_scales;
    request.topk_idx = input.topk_idx;
    if (options_.weights == Weights::dispatch) request.topk_weights = input.topk_weights;
    request.output = options_.output;
    request.layout = options_.layout;
    request.expert_alignment = options_.alignment;
    request.stream = stream;
    if (stream.present()) request.capacity = capacity_;
    if (stream.present() && outputs_.x.present()) request.outputs = outputs_;
    const auto allocate = [this](const AllocationRequest& r) -> Allocation {
      if (r.name == "handle") return {enough(handle_, r.like.bytes()), nullptr};
      if (r.name == "places") return {enough(places_, r.like.bytes()), nullptr};
      if (r.name == "x") return {outputs_.x.data(), nullptr};
      if (r.name == "source_tokens") return {outputs_.source_tokens.data(), nullptr};
      if (r.name == "topk_experts") return {outputs_.topk_experts.data(), nullptr};
      if (r.name == "scales") return {outputs_.scales.data(), nullptr};
      return {outputs_.topk_weights.data(), nullptr};
    };
    request.allocator = Allocator::of(allocate);
    result_ = object_.dispatch(request);
  }
  void combine(int step, const Stream& stream) override {
    HighThroughput::CombineRequest request;
    const TensorView& x = result_.outputs.x;  // where pool rows are, y may be too
    const TensorView y(y_.present() ? y_.data() : x.data(), out_.dtype(), {x.size(0), x.size(1)});
    request.y = y.on(x.device());
    request.handle = result_.handle;
    if (options_.grouped() && options_.weights == Weights::dispatch)
      request.row_weights = result_.outputs.topk_weights;
    request.out = {out_.data(), out_.dtype(), {inputs_.at(step).x.size(0), out_.size(1)}};
    request.stream = stream;
    object_.combine(request);
  }

 private:
  /// One is in use at a time: a pair of operations is over before the next begins.
  void* enough(TensorView& memory, std::size_t bytes) {
    if (!memory.present() || memory.bytes() < bytes)
      memory = device_.make(DType::uint8, {static_cast<std::int64_t>(bytes)});
    return memory.data();
  }

  HighThroughput& object_;
  DeviceTensors& device_;
  const Inputs& inputs_;
  const BenchOptions& options_;
  TensorView handle_, places_;
  std::int64_t capacity_ = 0;
  HighThroughput::Outputs outputs_;
  TensorView y_, out_;
  HighThroughput::DispatchResult result_;
};

/// What the benches of a mode start from, and what they do with an object of it.
template <class ObjectOf, class PairOf, class OptionsOf>
class Mode {
 public:
  Mode(const std::shared_ptr<Communicator>& communicator, const BenchOptions& options, bool graph)
      : communicator_(communicator),
        options_(options),
        graph_(graph),
        workload_({options.shape, communicator->size(), options.seed,
                   reference::RoutingPattern::parse(options.routing)}),
        steps_(make_steps(workload_, communicator->rank())),
        device_(communicator->cuda_device()),
        inputs_(device_, steps_, options.shape, options.fp8 && options.high_throughput) {}

  /// Verifies `checks` steps, then times.
  Measurement measure(const reference::RoundTripOptions& check, int checks) {
    if (options_.peer == "nccl") require_nccl();
    Measurement result = start_measurement(*communicator_, steps_, options_);
    result.sms = sms_of(*communicator_, options_.sms);
    const OptionsOf object_options = options_of({result.sms});
    auto object = ObjectOf::create(communicator_, object_options);
    result.arena_bytes = ObjectOf::memory_bytes(object_options, communicator_->size());
    result.staged_bytes = CommunicatorAccess::staging(*communicator_).carved();
    for (int step = 0; options_.verify && step < checks; ++step)
      result.report += round_trip(*object, *communicator_, workload_, step, check);
    PairOf pair(*object, device_, inputs_, options_, communicator_->size());
    time_pair(*communicator_, options_, device_, pair, result);
    if (graph_) time_graph(*communicator_, options_, device_, pair, result);
    time_kernels(*communicator_, options_, device_, pair, graph_, result);
    if (options_.late_us > 0) result.late = time_late(*communicator_, options_, device_, pair);
    result.burst_us = burst(options_.shape.row_bytes(), result.sms);
    result.dispatch_burst_us =
        options_.fp8 ? burst(options_.dispatch_row_bytes(), result.sms) : result.burst_us;
    if (options_.peer == "nccl")
      result.peers = bench_nccl(*communicator_, steps_, options_, device_.stream());
    return result;
  }

  /// Verifies one step of an object of the point's; then kernel times alone.
  void measure(SweepPoint& point, const reference::RoundTripOptions& check) {
    auto object = ObjectOf::create(communicator_, options_of(point));
    if (options_.verify) point.report = round_trip(*object, *communicator_, workload_, 0, check);
    DeviceTensors device(communicator_->cuda_device());
    PairOf pair(*object, device, inputs_, options_, communicator_->size());
    for (int i = 0; i < options_.warmup; ++i) {
      pair.dispatch(i, {});
      pair.combine(i, {});
    }
    Measurement result;
    time_kernels(*communicator_, options_, device, pair, graph_, result);
    point.kernel = result.kernel;
  }
  double burst(std::size_t row_bytes, int sms) {
    return time_burst(communicator_, steps_.traffic.wire * static_cast<double>(row_bytes), sms);
  }

 private:
  OptionsOf options_of(const SweepPoint& point) const {
    OptionsOf result;
    if constexpr (std::is_same_v<OptionsOf, HighThroughputOptions>)
      result = high_throughput_options(options_);
    else
      result = {options_.shape, options_.lanes};
    result.sms = point.sms;
    if constexpr (requires { result.tuning; }) result.tuning = point.tuning;
    return result;
  }

  std::shared_ptr<Communicator> communicator_;
  const BenchOptions& options_;
  bool graph_;  // the pair can be captured
  reference::Workload workload_;
  Steps steps_;
  DeviceTensors device_;
  Inputs inputs_;
};

using LowLatencyMode = Mode<LowLatency, LowLatencyPair, LowLatencyOptions>;
using HighThroughputMode = Mode<HighThroughput, HighThroughputPair, HighThroughputOptions>;

/// Pool output is not captured: its slots alternate from one replay to the next.
bool can_capture(const BenchOptions& options) {
  return !options.high_throughput || options.output == HighThroughput::Output::owned;
}

/// What `--tune` tries on so many SMs; the first is the formula.
std::vector<SweepPoint> tuning_points(const BenchOptions& options, int sms) {
  std::vector<SweepPoint> points{{sms}};
  if (!options.high_throughput) {
    for (int eighths : {1, 2, 4, 6}) points.push_back({std::max(1, sms * eighths / 8)});
    return points;
  }
  for (int warps : {2, 4, 8, 12})
    for (int ring : {28672, 57344, 114688, 229376}) points.push_back({sms, {warps, ring}});
  return points;
}

template <class ModeOf>
std::vector<SweepPoint> sweep_of(ModeOf&& mode, const Communicator& communicator,
                                 const BenchOptions& options,
                                 const reference::RoundTripOptions& check) {
  std::vector<SweepPoint> points;
  for (int asked : options.sweep.empty() ? std::vector<int>{options.sms} : options.sweep) {
    const int sms = sms_of(communicator, asked);
    const auto here = options.tune ? tuning_points(options, sms) : std::vector<SweepPoint>{{sms}};
    points.insert(points.end(), here.begin(), here.end());
  }
  for (std::size_t i = 0; i < points.size(); ++i) {
    SweepPoint& point = points[i];
    mode.measure(point, check);
    if (i > 0 && point.sms == points[i - 1].sms) {
      point.burst_us = points[i - 1].burst_us;
      point.dispatch_burst_us = points[i - 1].dispatch_burst_us;
    } else {
      point.burst_us = mode.burst(options.shape.row_bytes(), point.sms);
      point.dispatch_burst_us =
          options.fp8 ? mode.burst(options.dispatch_row_bytes(), point.sms) : point.burst_us;
    }
  }
  return points;
}

}  // namespace

Measurement bench_cuda_low_latency(const std::shared_ptr<Communicator>& communicator,
                                   const BenchOptions& options) {
  return LowLatencyMode(communicator, options, can_capture(options)).measure(check_of(options), 2);
}

Measurement bench_cuda_high_throughput(const std::shared_ptr<Communicator>& communicator,
                                       const BenchOptions& options) {
  return HighThroughputMode(communicator, options, can_capture(options))
      .measure(check_of(options), 1);
}

std::vector<SweepPoint> sweep(const std::shared_ptr<Communicator>& communicator,
                              const BenchOptions& options) {
  BenchOptions plain = options;
  plain.trace = false;
  const bool graph = can_capture(plain);
  if (options.high_throughput)
    return sweep_of(HighThroughputMode(communicator, plain, graph), *communicator, plain,
                    check_of(plain));
  return sweep_of(LowLatencyMode(communicator, plain, graph), *communicator, plain,
                  check_of(plain));
}

}  // namespace expertwire::tools
