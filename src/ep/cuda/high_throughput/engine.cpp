#include "ep/front/high_throughput_engine.hpp"

#include <atomic>
#include <deque>
#include <numeric>

#include "base/check.hpp"
#include "base/env.hpp"
#include "ep/cuda/high_throughput/kernels.hpp"
#include "ep/cuda/kernel/tuning.hpp"
#include "ep/cuda/runtime/block_pool.hpp"
#include "ep/cuda/runtime/runtime.hpp"

namespace expertwire::inline v0::ep {

namespace {

using cuda::BlockPool;
using cuda::Carver;
using cuda::CountsMirror;
using cuda::HighThroughputRouting;
using cuda::Runtime;

struct CudaHandle final : HighThroughputHandle {
  std::shared_ptr<std::byte> routing_memory;  // shared with the handle that was cached
  HighThroughputRouting routing{};
  int routing_lane = 0;                      // whose pool the routing's memory comes from
  std::shared_ptr<std::byte> places_memory;  // of a grouped one, shared in the same way
  bool cached = false;                       // the routing is an earlier dispatch's
  std::shared_ptr<std::byte> epoch_memory;   // of a cached one; else the routing has it
  Epoch host_epoch = 0;     // of the dispatch, while no capture has made it unknown
  bool has_counts = false;  // the host has learnt them

  Epoch* epoch() const {
    return cached ? reinterpret_cast<Epoch*>(epoch_memory.get()) : routing.epoch;
  }
};

/// High throughput on CUDA. A dispatch is a notify and a dispatch kernel, one with a cached routing
/// the latter alone; a combine is one kernel.
class CudaEngine final : public HighThroughputEngine {
 public:
  CudaEngine(Object& object, const HighThroughputOptions& options, const Tuning& tuning);
  bool drain(Deadline deadline) override { return runtime_.drain(deadline); }

  HandlePointer make_handle(int lane, const HandlePointer& cached,
                            const HighThroughput::DispatchRequest& request) override;
  void plan(const Dispatch& work) override;
  void dispatch(const Dispatch& work) override;
  void combine(const Combine& work) override;
  void release(const HandlePointer& handle, const Stream& stream) override;
  HighThroughput::Outputs pool_view(const HighThroughputHandle& handle,
                                    std::int64_t rows) const override;
  TensorView needed_rows(HighThroughputHandle& handle) const override {
    return {static_cast<CudaHandle&>(handle).routing.needed, DType::int32, {1}};
  }
  Offsets offsets(HighThroughputHandle& handle) const override;
  void learn_counts(HighThroughputHandle& handle) const override;
  void check_sms(int sms) const override { runtime_.check_sms(sms); }
  void refresh(Status& status) const override { runtime_.refresh(status, most_.top_k); }
  Allocator default_allocator() const override { return runtime_.allocator(); }
  bool captures(const Stream& stream) const override {
    return cuda::StreamPlace(runtime_.stream_of(0, stream)).captured();
  }

 private:
  /// A dispatch whose credit has not been granted.
  struct Reading {
    std::shared_ptr<CudaHandle> handle;
    bool done;
  };
  struct Lane {
    std::shared_ptr<BlockPool> routings, epochs;
    std::uint32_t* chunk_rows = nullptr;
    std::uint32_t* tickets = nullptr;
    cuda::FrameQueue* queue = nullptr;
    Tagged* tallies = nullptr;
    CountsMirror mirror{};
    std::uint32_t ticket = 0;
    std::uint64_t dispatches = 0;
    bool captured = false;         // replays may have advanced the epochs since
    std::deque<Reading> readings;  // oldest first
  };

  /// The lane of a handle's routing, if it is another than its own: that may still be on its way
  /// there, and must not be written again before this handle's operations have read it.
  static int other_lane_of(const CudaHandle& handle) {
    return handle.routing_lane == handle.lane ? -1 : handle.routing_lane;
  }
  Lane& lane_of(const HandleState& handle) { return lanes_[static_cast<std::size_t>(handle.lane)]; }
  std::size_t carve_routing(std::byte* base, std::int64_t tokens, bool grouped,
                            HighThroughputRouting* routing) const;
  void take_places(CudaHandle& handle, const Allocator& allocator, const Stream& stream);
  void make_lane(Lane& lane);
  void learn_epoch(CudaHandle& handle, const Dispatch& work);
  void read_mirror(CudaHandle& handle, const Lane& lane) const;
  static std::shared_ptr<CudaHandle> settle(Lane& lane, const CudaHandle* finished);
  cuda::HighThroughputShape shape_of(const MoeShape& call) const;
  /// Blocks that move rows.
  int workers_of(const Runtime::Job& job) const {
    const int allowed = runtime_.workers_of(job);
    return runtime_.all_staged() ? cuda::staged_workers(allowed) : allowed;
  }

  Runtime runtime_;
  MoeShape most_;
  HighThroughputSlots slots_;
  std::uint32_t queue_places_;
  bool bulk_;
  Tuning tuning_;
  double link_bytes_per_us_ = 0;
  std::vector<Lane> lanes_;
};

/// A power of two that all frames of all rings fit into: no more are written and not announced. An
/// announcer looks at 128 at once.
std::uint32_t queue_places_of(const HighThroughputSlots& slots) {
  const std::uint64_t frames = (slots.most.ranks - 1) * slots.ring.frames;
  std::uint32_t places = 128;
  while (places < frames) places *= 2;
  return places;
}

/// What kernels are told of a call's shape.
cuda::HighThroughputShape CudaEngine::shape_of(const MoeShape& call) const {
  const auto ranks = static_cast<int>(slots_.most.ranks);
  return {slots_.with(slot_sizes(call, ranks)),
          {ranks, call.experts},
          call.top_k,
          std::min(call.top_k, ranks),
          call.dtype};
}

CudaEngine::CudaEngine(Object& object, const HighThroughputOptions& options, const Tuning& tuning)
    : runtime_(object, make_region(object, options), options.lanes, options.sms),
      most_(options.shape),
      slots_(high_throughput_slots(options, object.communicator()->size())),
      queue_places_(queue_places_of(slots_)),
      bulk_(runtime_.share().bulk_copies()),
      tuning_(tuning),
      lanes_(static_cast<std::size_t>(options.lanes)) {
  const DeviceGuard guard(runtime_.share().device());
  check_cuda(cuda::prepare_high_throughput_notify(), "loading notify");
  check_cuda(cuda::prepare_high_throughput_dispatch(bulk_), "loading dispatch");
  check_cuda(cuda::prepare_high_throughput_combine(bulk_), "loading combine");
  for (Lane& lane : lanes_) make_lane(lane);
  // No rows are in the pool yet, so it can be written to.
  const SlotSizes& sizes = slots_.most;
  link_bytes_per_us_ = runtime_.measure_links(
      {slots_.pool, static_cast<std::size_t>(sizes.pool_rows * sizes.row_bytes)});
}

void CudaEngine::make_lane(Lane& lane) {
  const auto share = runtime_.shared_share();
  const SlotSizes& sizes = slots_.most;
  constexpr std::uint64_t kUsualTokens = 4096;  // handles of more are made when they come
  const auto tokens = static_cast<std::int64_t>(std::min(sizes.max_tokens, kUsualTokens));
  lane.routings =
      std::make_shared<BlockPool>(share, carve_routing(nullptr, tokens, false, nullptr));
  lane.epochs = std::make_shared<BlockPool>(share, sizeof(Epoch));
  const std::size_t values =
      CountsMirror::kHeader + static_cast<std::size_t>(sizes.ranks + sizes.local_experts);
  const auto mirror = allocate_pinned((values + 1) * sizeof(std::int32_t));
  runtime_.keep(mirror);
  lane.mirror.values = static_cast<std::int32_t*>(mirror.get());
  lane.mirror.ticket = reinterpret_cast<std::uint32_t*>(lane.mirror.values + values);
  const std::size_t chunks = sizes.ranks * slots_.chunks();
  // The queue's head and tail, and its places of two words.
  const std::size_t words = chunks + cuda::kTickets + cuda::kTickets % 2 + chunks % 2;
  const std::size_t bytes = (words + 2 + 2 * queue_places_) * sizeof(std::uint32_t);
  const auto counters = allocate_on_device(bytes, share->device(), share->memory_stream());
  runtime_.keep(counters);
  lane.chunk_rows = static_cast<std::uint32_t*>(counters.get());
  lane.tickets = lane.chunk_rows + chunks;
  lane.queue = reinterpret_cast<cuda::FrameQueue*>(lane.chunk_rows + words);
  check_cuda(cudaMemsetAsync(lane.chunk_rows, 0, bytes, share->memory_stream().get()),
             "cudaMemsetAsync");
  // Tallies carry an epoch, and at first the one before all.
  const Tagged never{0, Env::get().first_epoch};
  const std::vector<Tagged> tallies(
      cuda::kMostTallies * (sizes.ranks + sizes.ranks * sizes.local_experts), never);
  const std::size_t tally_bytes = tallies.size() * sizeof(Tagged);
  const auto tally_memory =
      allocate_on_device(tally_bytes, share->device(), share->memory_stream());
  runtime_.keep(tally_memory);
  lane.tallies = static_cast<Tagged*>(tally_memory.get());
  check_cuda(cudaMemcpyAsync(lane.tallies, tallies.data(), tally_bytes, cudaMemcpyHostToDevice,
                             share->memory_stream().get()),
             "cudaMemcpyAsync");
  check_cuda(cudaStreamSynchronize(share->memory_stream().get()), "cudaStreamSynchronize");
}

std::size_t CudaEngine::carve_routing(std::byte* base, std::int64_t tokens, bool grouped,
                                      HighThroughputRouting* routing) const {
  const SlotSizes& sizes = slots_.most;
  const auto count = static_cast<std::size_t>(tokens);
  Carver carver(base);
  HighThroughputRouting r{};
  r.destinations = carver.take<Destination>(count * std::min(sizes.top_k, sizes.ranks));
  r.experts = carver.take<std::int32_t>(count * sizes.top_k);
  r.epoch = carver.take<Epoch>(1);
  r.rows_to = carver.take<std::int32_t>(sizes.ranks);
  r.rows_from = carver.take<std::int32_t>(sizes.ranks);
  r.first_at = carver.take<std::int32_t>(sizes.ranks);
  r.first_from = carver.take<std::int32_t>(sizes.ranks + 1);
  r.capacity = carver.take<std::int32_t>(sizes.ranks);
  r.needed = carver.take<std::int32_t>(1);
  r.overflow = carver.take<std::int32_t>(1);
  if (grouped) {
    r.positions = carver.take<std::int32_t>(count * sizes.top_k);
    r.first_in = carver.take<std::int32_t>(sizes.ranks * sizes.local_experts);
    r.expert_offsets = carver.take<std::int32_t>(sizes.local_experts + 1);
    r.group_offsets = carver.take<std::int32_t>(sizes.local_experts + 1);
  }
  if (routing != nullptr) *routing = r;
  return carver.bytes();
}

/// Memory for the places of what comes: of so many tokens, if the host knows that; else of all.
void CudaEngine::take_places(CudaHandle& handle, const Allocator& allocator, const Stream& stream) {
  std::int64_t rows = static_cast<std::int64_t>(slots_.most.ranks) * most_.max_tokens;
  if (handle.has_counts)
    rows = std::accumulate(handle.rows_per_source.begin(), handle.rows_per_source.end(),
                           std::int64_t{0});
  const cuda::StreamPlace place(runtime_.stream_of(handle.lane, stream));
  const auto values =
      static_cast<std::size_t>(std::max<std::int64_t>(rows, 1) * handle.shape.top_k);
  handle.places_memory =
      lane_of(handle).routings->take(place, values * sizeof(std::int32_t), allocator, "places");
  handle.routing.places = reinterpret_cast<std::int32_t*>(handle.places_memory.get());
}

// Dispatch ---------------------------------------------------------------------------------------

HighThroughputEngine::HandlePointer CudaEngine::make_handle(
    int number, const HandlePointer& cached, const HighThroughput::DispatchRequest& request) {
  Lane& lane = lanes_[static_cast<std::size_t>(number)];
  const cuda::StreamPlace place(runtime_.stream_of(number, request.stream));
  auto handle = std::make_shared<CudaHandle>();
  if (cached) {
    handle->epoch_memory = lane.epochs->take(place, request.allocator);
    const auto& from = static_cast<const CudaHandle&>(*cached);
    handle->routing_memory = from.routing_memory;
    handle->routing = from.routing;
    handle->places_memory = from.places_memory;
    handle->routing_lane = from.routing_lane;
    handle->cached = true;
    if (place.captured() && !request.allocator) {
      cuda::keep_with_graph(place, handle->routing_memory);
      if (handle->places_memory) cuda::keep_with_graph(place, handle->places_memory);
    }
  } else {
    handle->routing_lane = number;
    const std::int64_t tokens = request.x.size(0);
    const bool grouped = request.layout == HighThroughput::Layout::expert_major;
    handle->routing_memory = lane.routings->take(
        place, carve_routing(nullptr, tokens, grouped, nullptr), request.allocator);
    carve_routing(handle->routing_memory.get(), tokens, grouped, &handle->routing);
  }
  lane.captured = lane.captured || place.captured();
  handle->host_epoch = Env::get().first_epoch + static_cast<Epoch>(lane.dispatches) + 1;
  ++lane.dispatches;
  return handle;
}

/// Learns the epoch of a dispatch to the pool, which says where its rows will be. After a capture
/// replays have advanced it unseen; then the counts bring it, or, without counts, it is read from
/// the device, once all that the host gave to the lane is done.
void CudaEngine::learn_epoch(CudaHandle& handle, const Dispatch& work) {
  const bool told = !work.cached && (!work.request.capacity || !work.request.stream.present());
  if (!handle.in_pool || !lane_of(handle).captured || told) return;
  const auto job = Runtime::Job::of(handle.lane, "high-throughput dispatch", work.request);
  handle.host_epoch = runtime_.read_epoch(job, slots_.dispatch.words) + 1;
}

void CudaEngine::plan(const Dispatch& work) {
  auto& handle = static_cast<CudaHandle&>(*work.handle);
  learn_epoch(handle, work);
  // Before anything is sent, unless it depends on that.
  if (handle.grouped && !work.cached && !work.eager())
    take_places(handle, work.request.allocator, work.request.stream);
  Lane& lane = lane_of(handle);
  auto job = Runtime::Job::of(handle.lane, "high-throughput dispatch", work.request);
  job.wait = false;
  if (work.cached) {
    const auto& cached = static_cast<const CudaHandle&>(*work.cached);
    handle.needed = cached.needed;
    handle.overflow = cached.overflow;
    handle.rows_per_source = cached.rows_per_source;
    handle.rows_per_expert = cached.rows_per_expert;
    handle.has_counts = cached.has_counts;
    return;
  }
  const bool told = work.eager() || !work.request.stream.present();
  cuda::NotifyParams p{};
  p.context = runtime_.context_of(job);
  p.shape = shape_of(handle.shape);
  p.routing = handle.routing;
  p.tokens = handle.tokens;
  p.capacity = static_cast<std::int32_t>(handle.room);
  p.strict = work.eager();
  p.alignment = handle.alignment;
  p.call = handle.call(work.call_options(), handle.format);
  p.ids = {work.request.topk_idx.data(), work.request.topk_idx.dtype() == DType::int64};
  if (told) p.mirror = lane.mirror;
  p.ticket = ++lane.ticket;
  p.tallies = lane.tallies;
  const int blocks = runtime_.workers_of(job);
  runtime_.run(job, [&](cudaStream_t stream) {
    check_cuda(cuda::launch(p, {blocks, stream}), "launch of notify");
  });
  if (!told) return;
  runtime_.watch(job, [&] {
    return std::atomic_ref(*lane.mirror.ticket).load(std::memory_order_acquire) == p.ticket;
  });
  read_mirror(handle, lane);
}

void CudaEngine::read_mirror(CudaHandle& handle, const Lane& lane) const {
  const std::int32_t* values = lane.mirror.values;
  handle.needed = values[CountsMirror::kNeeded];
  handle.overflow = values[CountsMirror::kOverflow] != 0;
  handle.host_epoch = static_cast<Epoch>(values[CountsMirror::kEpoch]);
  const std::int32_t* sources = values + CountsMirror::kHeader;
  const std::int32_t* experts = sources + slots_.most.ranks;
  handle.rows_per_source.assign(sources, experts);
  handle.rows_per_expert.assign(
      experts, experts + handle.shape.experts / static_cast<int>(slots_.most.ranks));
  handle.has_counts = true;
}

CudaEngine::Offsets CudaEngine::offsets(HighThroughputHandle& handle) const {
  const HighThroughputRouting& routing = static_cast<CudaHandle&>(handle).routing;
  const auto ranks = static_cast<int>(slots_.most.ranks);
  const auto view = [&](std::int32_t* values, std::int64_t count) {
    return values == nullptr
               ? TensorView()
               : TensorView(values, DType::int32, {count + 1}).on(runtime_.share().device());
  };
  const int local = handle.shape.experts / ranks;
  return {view(routing.first_from, ranks), view(routing.expert_offsets, local),
          view(routing.group_offsets, local)};
}

void CudaEngine::learn_counts(HighThroughputHandle& handle) const {
  auto& mine = static_cast<CudaHandle&>(handle);
  if (mine.has_counts) return;
  // A cached dispatch of a handle whose counts stayed on the device; it is done.
  const cudaStream_t stream = runtime_.share().memory_stream().get();
  mine.rows_per_source.resize(slots_.most.ranks);
  check_cuda(cudaMemcpyAsync(mine.rows_per_source.data(), mine.routing.rows_from,
                             mine.rows_per_source.size() * sizeof(std::int32_t),
                             cudaMemcpyDeviceToHost, stream),
             "cudaMemcpyAsync");
  check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
}

void CudaEngine::dispatch(const Dispatch& work) {
  auto handle = std::static_pointer_cast<CudaHandle>(work.handle);
  Lane& lane = lane_of(*handle);
  auto job = Runtime::Job::of(handle->lane, "high-throughput dispatch", work.request);
  job.other_lane = other_lane_of(*handle);
  std::exception_ptr refused;  // by the allocator: the other ranks' rows are let through
  if (handle->grouped && !handle->places_memory) {
    try {
      take_places(*handle, work.request.allocator, work.request.stream);
    } catch (...) {
      refused = std::current_exception();
    }
  }
  lane.readings.push_back({handle, !handle->in_pool || handle->overflow});
  cuda::HighThroughputDispatchParams p{};
  p.context = runtime_.context_of(job);
  p.shape = shape_of(handle->shape);
  p.routing = handle->routing;
  p.format = handle->format;
  p.pool = handle->in_pool;
  const bool owned = !p.pool;
  const int blocks = workers_of(job);
  const cuda::Sending sending =
      asked_or(tuning_, cuda::sending_of({blocks, link_bytes_per_us_, owned, bulk_}));
  constexpr int kMostSenders = cuda::kHighThroughputWarps - cuda::kFewestReceivers;
  p.senders = owned ? std::min(sending.warps, kMostSenders) : sending.warps;
  // Receivers need rings, too, if they copy.
  const int warps = owned ? cuda::kHighThroughputWarps : p.senders;
  p.moving = cuda::plan_moving(
      {p.format.data_bytes, warps, 1, sending.stages_bytes, bulk_, /*awaited=*/owned});
  p.call = handle->call(work.call_options(), p.format);
  p.call.lane = handle->routing_lane;
  p.tokens = handle->tokens;
  p.keep = settle(lane, nullptr) != handle;
  p.epoch = handle->epoch();
  p.chunk_rows = lane.chunk_rows;
  p.tickets = lane.tickets;
  p.queue = lane.queue;
  p.queue_places = queue_places_;
  p.x = work.request.x.as<std::byte>();
  p.x_scales = work.request.x_scales.as<float>();
  p.topk_weights =
      work.request.topk_weights.present() ? work.request.topk_weights.as<float>() : nullptr;
  p.grouped = handle->grouped;
  p.places_known = work.cached != nullptr;
  p.out_rows = static_cast<std::int32_t>(handle->output_rows);
  if (work.outputs.x.present() && !refused) {
    p.out_x = work.outputs.x.as<std::byte>();
    p.out_tokens = work.outputs.source_tokens.as<std::int32_t>();
    p.out_experts = work.outputs.topk_experts.as<std::int32_t>();
    p.out_weights = work.outputs.topk_weights.as<float>();
    p.out_scales = work.outputs.scales.as<float>();
  }
  runtime_.run(job, [&](cudaStream_t stream) {
    check_cuda(cuda::launch(p, {blocks, stream}), "launch of dispatch");
  });
  if (refused) std::rethrow_exception(refused);
}

/// Notes that a dispatch's rows have been read, and returns the latest whose credit can be granted
/// now, or null. A credit covers all epochs up to it, so a later one waits for an earlier.
std::shared_ptr<CudaHandle> CudaEngine::settle(Lane& lane, const CudaHandle* finished) {
  for (Reading& reading : lane.readings)
    if (reading.handle.get() == finished) reading.done = true;
  std::shared_ptr<CudaHandle> latest;
  while (!lane.readings.empty() && lane.readings.front().done) {
    latest = lane.readings.front().handle;
    lane.readings.pop_front();
  }
  return latest;
}

// Combine ----------------------------------------------------------------------------------------

void CudaEngine::combine(const Combine& work) {
  auto handle = std::static_pointer_cast<CudaHandle>(work.handle);
  Lane& lane = lane_of(*handle);
  auto job = Runtime::Job::of(handle->lane, "high-throughput combine", work.request);
  job.other_lane = other_lane_of(*handle);
  const int warps = cuda::kHighThroughputWarps;
  cuda::HighThroughputCombineParams p{};
  p.context = runtime_.context_of(job);
  MoeShape shape = handle->shape;
  shape.dtype = work.request.y.dtype();
  p.shape = shape_of(shape);
  p.routing = handle->routing;
  const auto row_bytes = static_cast<std::uint32_t>(shape.row_bytes());
  // A grouped token has at most K rows, of its copies here and of other ranks.
  const int pushed = handle->grouped ? p.shape.top_k : 1;
  const int summed = handle->grouped ? p.shape.top_k : p.shape.width;
  p.pushing =
      cuda::plan_moving({row_bytes, warps, pushed, cuda::kStagesBytes, bulk_, /*awaited=*/true});
  p.summing =
      cuda::plan_moving({row_bytes, warps, summed, cuda::kStagesBytes, bulk_, /*awaited=*/false});
  p.call = handle->call(0, RowFormat::of(work.request.y.dtype(), handle->shape.hidden));
  p.tokens = handle->tokens;
  p.pull = handle->in_pool && work.request.y.data() == pool_view(*handle, 0).x.data();
  p.epoch = handle->epoch();
  std::shared_ptr<CudaHandle> released;
  if (handle->in_pool && !handle->release_called) released = settle(lane, handle.get());
  if (released) p.release = released->epoch();
  p.tickets = lane.tickets;
  p.queue = lane.queue;
  p.queue_places = queue_places_;
  p.grouped = handle->grouped;
  p.y = work.request.y.as<std::byte>();
  if (work.request.row_weights.present()) p.row_weights = work.request.row_weights.as<float>();
  p.topk_weights =
      work.request.topk_weights.present() ? work.request.topk_weights.as<float>() : nullptr;
  p.bias = work.request.bias.present() ? work.request.bias.as<std::byte>() : nullptr;
  p.out = work.out.as<std::byte>();
  p.out_topk_weights =
      work.out_topk_weights.present() ? work.out_topk_weights.as<float>() : nullptr;
  const int blocks = workers_of(job);
  p.pushers = cuda::pushers_of({blocks, link_bytes_per_us_, true, bulk_},
                               static_cast<int>(slots_.most.ranks) - 1);
  if (p.grouped) p.pushers = cuda::grouped_pushers(p.shape.top_k, p.shape.placement.ranks);
  runtime_.run(job, [&](cudaStream_t stream) {
    check_cuda(cuda::launch(p, {blocks, stream}), "launch of combine");
  });
}

void CudaEngine::release(const HandlePointer& pointer, const Stream& stream) {
  auto handle = std::static_pointer_cast<CudaHandle>(pointer);
  const auto released = settle(lane_of(*handle), handle.get());
  if (!released) return;
  const Runtime::Job job{.lane = handle->lane, .operation = "release", .stream = stream};
  cuda::NotifyParams p{};
  p.context = runtime_.context_of(job);
  p.shape = shape_of(most_);
  p.release = released->epoch();
  runtime_.run(job, [&](cudaStream_t on) {
    check_cuda(cuda::launch(p, {1, on}), "launch of notify");
  });
}

HighThroughput::Outputs CudaEngine::pool_view(const HighThroughputHandle& handle,
                                              std::int64_t rows) const {
  const auto& mine = static_cast<const CudaHandle&>(handle);
  const HighThroughputSlots& slots = slots_;
  const Epoch n = mine.host_epoch;
  std::byte* base = runtime_.lane_base(handle.lane);
  const RowFormat& format = handle.format;
  const auto view = [&](std::uint64_t offset, DType dtype, std::int64_t width) {
    const TensorView all = width == 0 ? TensorView(base + offset, dtype, {rows})
                                      : TensorView(base + offset, dtype, {rows, width});
    return all.on(runtime_.share().device());
  };
  return {view(slots.pool_row_of(n, 0, 0), format.dtype, mine.shape.hidden),
          view(slots.pool_token_of(n, 0), DType::int32, 0),
          view(slots.pool_experts_of(n, 0), DType::int32, mine.shape.top_k),
          view(slots.pool_weights_of(n, 0), DType::fp32, mine.shape.top_k),
          format.scales > 0 ? view(slots.pool_scales_of(n, 0), format.scale_dtype(), format.scales)
                            : TensorView()};
}

/// What was asked for, by the caller or the environment.
Tuning checked_tuning(Tuning tuning) {
  const Env& env = Env::get();
  if (tuning.sender_warps == 0) tuning.sender_warps = env.sender_warps;
  if (tuning.ring_bytes == 0) tuning.ring_bytes = env.ring_bytes;
  check_argument(tuning.sender_warps >= 0 && tuning.sender_warps < cuda::kHighThroughputWarps,
                 "tuning.sender_warps (or EXPERTWIRE_SENDER_WARPS) is {}; it must be from 1 to {}, "
                 "or 0",
                 tuning.sender_warps, cuda::kHighThroughputWarps - 1);
  constexpr int kMost = static_cast<int>(cuda::kStagesBytes);
  constexpr int kFewest = static_cast<int>(cuda::kFewestStagesBytes);
  check_argument(
      tuning.ring_bytes == 0 || (tuning.ring_bytes >= kFewest && tuning.ring_bytes <= kMost),
      "tuning.ring_bytes (or EXPERTWIRE_RING_BYTES) is {}; it must be from {} to {}, or 0",
      tuning.ring_bytes, kFewest, kMost);
  return tuning;
}

}  // namespace

std::unique_ptr<HighThroughputEngine> make_cuda_engine(Object& object,
                                                       const HighThroughputOptions& options) {
  cuda::check_limits(object, options.shape);
  return std::make_unique<CudaEngine>(object, options, checked_tuning(options.tuning));
}

}  // namespace expertwire::ep
