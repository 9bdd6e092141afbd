#include "ep/cuda/runtime.hpp"

#include <algorithm>
#include <atomic>
#include <map>
#include <thread>

#include "base/check.hpp"
#include "base/cuda_event.hpp"
#include "base/env.hpp"
#include "ep/cuda/trace.hpp"

namespace expertwire::ep::cuda {

unsigned long long capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status{};
  unsigned long long id = 0;
  check_cuda(cudaStreamGetCaptureInfo(stream, &status, &id), "cudaStreamGetCaptureInfo");
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

// Chain ------------------------------------------------------------------------------------------

Chain::Chain(int device) : device_(device) {
  const DeviceGuard guard(device);
  check_cuda(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreate");
  check_cuda(cudaEventCreateWithFlags(&captured_event_, cudaEventDisableTiming), "cudaEventCreate");
}

Chain::~Chain() {
  const DeviceGuard guard(device_);
  cudaEventDestroy(event_);
  cudaEventDestroy(captured_event_);
}

void Chain::enter(const StreamPlace& place) {
  // Between a capture and other work, or another capture, the caller keeps the order.
  const Last& last = place.captured() ? captured_ : uncaptured_;
  if (!last.used || last.capture != place.capture || last.stream == place.stream) return;
  check_cuda(cudaStreamWaitEvent(place.stream, place.captured() ? captured_event_ : event_, 0),
             "cudaStreamWaitEvent");
}

void Chain::leave(const StreamPlace& place) {
  (place.captured() ? captured_ : uncaptured_) = {true, place.capture, place.stream};
  check_cuda(cudaEventRecord(place.captured() ? captured_event_ : event_, place.stream),
             "cudaEventRecord");
}

void Chain::drain() noexcept { cudaEventSynchronize(event_); }

// DeviceShare ------------------------------------------------------------------------------------

std::shared_ptr<DeviceShare> DeviceShare::of(const std::shared_ptr<Communicator>& communicator) {
  static std::mutex mutex;
  static std::map<Communicator*, std::weak_ptr<DeviceShare>> all;
  std::lock_guard lock(mutex);
  std::erase_if(all, [](const auto& entry) { return entry.second.expired(); });
  auto& place = all[communicator.get()];
  auto share = place.lock();
  if (!share) place = share = std::make_shared<DeviceShare>(*communicator);
  return share;
}

namespace {

int attribute_of(int device, cudaDeviceAttr attribute) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

int sms_of(const Communicator& communicator) {
  const int sms = attribute_of(communicator.cuda_device(), cudaDevAttrMultiProcessorCount);
  const int ranks = communicator.topology().ranks_on_gpu(communicator.rank());
  check(ranks <= sms, ErrorCode::unsupported, "{} ranks share a GPU of {} SMs; at most {} can",
        ranks, sms, sms);
  return sms / ranks;
}

/// What kernels declare in their code: a few words.
constexpr std::uint32_t kOwnSharedBytes = 1024;

}  // namespace

DeviceShare::DeviceShare(const Communicator& communicator)
    : device_(communicator.cuda_device()),
      sms_(sms_of(communicator)),
      bulk_copies_(attribute_of(device_, cudaDevAttrComputeCapabilityMajor) >= 9 &&
                   Env::get().cuda_copies != "vector"),
      shared_bytes_(static_cast<std::uint32_t>(
                        attribute_of(device_, cudaDevAttrMaxSharedMemoryPerBlockOptin)) -
                    kOwnSharedBytes),
      stream_(make_cuda_stream(device_)),
      memory_stream_(make_cuda_stream(device_)),
      order_(device_) {}

void DeviceShare::join(int sms) {
  std::lock_guard lock(mutex_);
  joined_ += sms;
}

void DeviceShare::leave(int sms) {
  std::lock_guard lock(mutex_);
  joined_ -= sms;
}

void DeviceShare::enter_order(const StreamPlace& place) {
  std::lock_guard lock(mutex_);
  if (joined_ > sms_) order_.enter(place);
}

void DeviceShare::leave_order(const StreamPlace& place) {
  std::lock_guard lock(mutex_);
  if (joined_ > sms_) order_.leave(place);
}

// BlockPool --------------------------------------------------------------------------------------

BlockPool::BlockPool(std::shared_ptr<DeviceShare> share, std::size_t bytes, int count)
    : share_(std::move(share)), bytes_(align_up(bytes, 256)) {
  add(count);
}

void BlockPool::add(int count) {
  owned_.push_back(allocate_on_device(bytes_ * static_cast<std::size_t>(count), share_->device(),
                                      share_->memory_stream()));
  for (int i = 0; i < count; ++i)
    free_.push_back(static_cast<std::byte*>(owned_.back().get()) +
                    bytes_ * static_cast<std::size_t>(i));
}

std::shared_ptr<std::byte> BlockPool::take(bool captured) {
  std::lock_guard lock(mutex_);
  if (free_.empty()) {
    check(
        !captured, ErrorCode::capacity,
        "a captured dispatch needs memory for its handle, of which {} are in use; raise `handles` "
        "in the options, because a capture must not allocate",
        owned_.size());
    add(1);
  }
  std::byte* block = free_.back();
  free_.pop_back();
  // What a graph replays must never be anybody else's.
  if (captured) return {block, [pool = shared_from_this()](std::byte*) {}};
  return {block, [pool = shared_from_this()](std::byte* p) {
            std::lock_guard back(pool->mutex_);
            pool->free_.push_back(p);
          }};
}

// Runtime ----------------------------------------------------------------------------------------

Runtime::Runtime(Object& object, std::shared_ptr<Region> region, int lanes, int sms)
    : object_(object), region_(std::move(region)), share_(DeviceShare::of(object.communicator())) {
  check_argument(sms >= 0, "sms is {}; it must not be negative", sms);
  sms_ = sms == 0 ? share_->sms() : std::min(sms, share_->sms());
  const DeviceGuard guard(share_->device());
  words_memory_ = allocate_pinned(sizeof(HostWords));
  words_ = static_cast<HostWords*>(words_memory_.get());
  failure_memory_ =
      allocate_on_device(sizeof(FailureWords), share_->device(), share_->memory_stream());
  failure_ = static_cast<FailureWords*>(failure_memory_.get());
  check_cuda(cudaMemsetAsync(failure_, 0, sizeof(*failure_), share_->memory_stream().get()),
             "cudaMemsetAsync");
  check_cuda(cudaStreamSynchronize(share_->memory_stream().get()), "cudaStreamSynchronize");
  allocator_ = [share = share_](const AllocationRequest& request) -> Allocation {
    auto memory = allocate_on_device(std::max<std::size_t>(request.bytes, 16), share->device(),
                                     share->memory_stream());
    return {memory.get(), memory};
  };
  const Communicator& communicator = *object.communicator();
  for (int l = 0; l < lanes; ++l) {
    chains_.push_back(std::make_unique<Chain>(share_->device()));
    Context& context = contexts_.emplace_back();
    context.rank = communicator.rank();
    context.size = communicator.size();
    for (int r = 0; r < context.size; ++r) context.bases[r] = region_->lane(r, l);
    context.host = words_;
    context.failure = failure_;
  }
  share_->join(sms_ * lanes);
}

Runtime::~Runtime() {
  drain();
  share_->leave(sms_ * static_cast<int>(chains_.size()));
}

void Runtime::drain() noexcept {
  const DeviceGuard guard(share_->device());
  for (const auto& chain : chains_) chain->drain();
}

cudaStream_t Runtime::stream_of(const Call& call) const {
  return call.stream != nullptr ? static_cast<cudaStream_t>(call.stream->cuda_handle())
                                : share_->stream();
}

Context Runtime::context_of(const Call& call) const {
  Context context = contexts_[static_cast<std::size_t>(call.lane)];
  context.trace = Trace::next(call.operation);
  const auto timeout = call.timeout.value_or(object_.communicator()->timeout());
  context.timeout_ns = static_cast<std::uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(timeout).count());
#if defined(EXPERTWIRE_TEST_FAULTS)
  const KernelFaults faults = kernel_faults(context.rank);
  context.removed = faults.removed;
  context.longest_delay_ns = faults.longest_delay_ns;
  context.stop_at = faults.stop_at;
#endif
  return context;
}

double Runtime::measure_links(const Scratch& scratch) {
  constexpr std::size_t kFewest = std::size_t{8} << 20, kMost = std::size_t{32} << 20;
  constexpr double kUnmeasured = 350e3;
  Communicator& communicator = *object_.communicator();
  const double asked = Env::get().link_gbps * 1e3;
  if (communicator.size() == 1 || scratch.bytes < kFewest) return asked > 0 ? asked : kUnmeasured;
  // What a rank knows may have gone with its last object, so ranks ask each other.
  double& known = share_->link_bytes_per_us;
  std::vector<double> all(static_cast<std::size_t>(communicator.size()));
  all[static_cast<std::size_t>(communicator.rank())] = known;
  communicator.all_gather(all.data(), sizeof(double));
  if (std::find(all.begin(), all.end(), 0.0) != all.end()) {
    known = time_copies({scratch.offset, std::min(scratch.bytes, kMost)});
    communicator.barrier();  // nobody sends rows before all have measured
  }
  return asked > 0 ? asked : known;
}

/// The fastest of a few copies to the next rank, in bytes a microsecond.
double Runtime::time_copies(const Scratch& scratch) const {
  constexpr int kCopies = 5;
  const DeviceGuard guard(share_->device());
  const Communicator& communicator = *object_.communicator();
  const int next = (communicator.rank() + 1) % communicator.size();
  cudaStream_t stream = share_->memory_stream().get();
  std::vector<CudaEvent> events(kCopies + 1);
  events[0].record(stream);
  for (std::size_t i = 0; i < kCopies; ++i) {
    check_cuda(
        cudaMemcpyAsync(region_->lane(next, 0) + scratch.offset, lane_base(0) + scratch.offset,
                        scratch.bytes, cudaMemcpyDefault, stream),
        "cudaMemcpyAsync");
    events[i + 1].record(stream);
  }
  check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  double us = events[1].us_since(events[0]);
  for (std::size_t i = 1; i < kCopies; ++i) us = std::min(us, events[i + 1].us_since(events[i]));
  return static_cast<double>(scratch.bytes) / std::max(us, 1e-3);
}

std::byte* Runtime::lane_base(int lane) const {
  return region_->lane(object_.communicator()->rank(), lane);
}

Epoch Runtime::read_epoch(int lane, std::uint64_t words) const {
  const DeviceGuard guard(share_->device());
  chains_[static_cast<std::size_t>(lane)]->drain();
  DirectionWords value{};
  check_cuda(cudaMemcpyAsync(&value, lane_base(lane) + words, sizeof(value), cudaMemcpyDeviceToHost,
                             share_->memory_stream().get()),
             "cudaMemcpyAsync");
  check_cuda(cudaStreamSynchronize(share_->memory_stream().get()), "cudaStreamSynchronize");
  return value.sent;
}

void check_limits(const Object& object, const MoeShape& shape, int handles) {
  const int ranks = object.communicator()->size();
  check(ranks <= kMostRanks, ErrorCode::unsupported,
        "{} ranks; the CUDA backend reaches at most {} by load and store", ranks, kMostRanks);
  check(shape.experts <= kMostExperts, ErrorCode::unsupported,
        "shape.experts is {}; the CUDA backend takes at most {}", shape.experts, kMostExperts);
  check_argument(handles >= 2 && handles <= 4096, "handles is {}; it must be from 2 to 4096",
                 handles);
}

void Runtime::begin(const Call& call, const StreamPlace& place) {
  throw_failure(call.operation);
  chains_[static_cast<std::size_t>(call.lane)]->enter(place);
  if (call.other_lane >= 0) chains_[static_cast<std::size_t>(call.other_lane)]->enter(place);
  share_->enter_order(place);
}

void Runtime::end(const Call& call, const StreamPlace& place) {
  share_->leave_order(place);
  chains_[static_cast<std::size_t>(call.lane)]->leave(place);
  if (call.other_lane >= 0) chains_[static_cast<std::size_t>(call.other_lane)]->leave(place);
  if (call.stream != nullptr || !call.wait) return;
  watch(call, [stream = place.stream] {
    const cudaError_t state = cudaStreamQuery(stream);
    if (state != cudaErrorNotReady) check_cuda(state, "cudaStreamQuery");
    return state == cudaSuccess;
  });
}

/// A peer that died is lost at once; one that left is lost if kernels still wait for it.
void Runtime::look_for_lost_peer(const char* operation) {
  Communicator& communicator = *object_.communicator();
  std::optional<Error> lost = communicator.find_lost_peer(-1);
  for (int r = 0; !lost && r < communicator.size(); ++r) {
    std::atomic_ref awaited(words_->awaited[r]);
    if (awaited.exchange(0) == 0) continue;
    lost = communicator.find_lost_peer(r);
    if (!lost) continue;
    // What it wrote before it left is there. Kernels find it in a moment; if they say later that
    // they wait still, it is lost.
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    awaited.store(0);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    if (awaited.load() == 0) lost.reset();
  }
  if (!lost) return;
  std::atomic_ref(words_->abort).store(1);
  cudaStreamSynchronize(share_->stream());
  const std::string message = fmt::format("{} cannot go on: {}", operation, lost->what());
  object_.fail(message);
  throw Error(ErrorCode::peer_lost, message, {communicator.rank(), lost->peer(), Phase::none});
}

void Runtime::give_up(const char* operation, const Deadline& deadline) {
  throw_failure(operation);
  std::atomic_ref(words_->abort).store(1);
  const std::string message =
      fmt::format("{}: no answer from device {} within {} ms; has a kernel been stopped?",
                  operation, share_->device(), deadline.budget().count());
  object_.fail(message);
  throw Error(ErrorCode::timeout, message, {object_.communicator()->rank(), -1, Phase::none});
}

namespace {

std::string describe(const HostWords& words, const char* operation) {
  const auto phase = static_cast<Phase>(words.phase);
  const bool row = phase == Phase::dispatch_rows || phase == Phase::combine_rows;
  switch (static_cast<ErrorCode>(words.code)) {
    case ErrorCode::mismatch:
      if (words.detail > 0)
        return fmt::format(
            "{}: rank {} sends rows of {}, this rank others; all ranks send the same", operation,
            words.peer, to_string(static_cast<DType>(words.detail - 1)));
      return fmt::format(
          "{}: rank {} gave a capacity and this rank none, or the other way round; "
          "all ranks give one, or none",
          operation, words.peer);
    case ErrorCode::peer_lost:
      return fmt::format("{} was given up after {} ms of waiting for rank {} ({} {})", operation,
                         words.waited_ms, words.peer, row ? "row" : "epoch", words.detail);
    default:
      return fmt::format(
          "{} waited {} ms for rank {} ({}, {} {}); is that rank alive, and does it "
          "make the same calls in the same order?",
          operation, words.waited_ms, words.peer, to_string(phase), row ? "row" : "epoch",
          words.detail);
  }
}

}  // namespace

void Runtime::throw_failure(const char* operation) const {
  if (std::atomic_ref(words_->failed).load(std::memory_order_acquire) == 0) return;
  object_.check_usable();  // it has been thrown before
  const std::string message = describe(*words_, operation);
  object_.fail(message);
  throw Error(static_cast<ErrorCode>(words_->code), message,
              {object_.communicator()->rank(), words_->peer, static_cast<Phase>(words_->phase)});
}

void Runtime::refresh(Status& status, int top_k) const {
  status.invalid_expert_ids = static_cast<std::int64_t>(
      std::atomic_ref(words_->invalid_ids).load(std::memory_order_acquire));
  status.dropped_rows = static_cast<std::int64_t>(
      std::atomic_ref(words_->dropped_rows).load(std::memory_order_acquire));
  const auto k = static_cast<std::uint64_t>(top_k), at = words_->first_invalid_at;
  if (at > 0)
    status.first_invalid_id =
        fmt::format("topk_idx[{}, {}] = {}", (at - 1) / k, (at - 1) % k, words_->first_invalid_id);
  if (status.failure.empty() &&
      std::atomic_ref(words_->failed).load(std::memory_order_acquire) != 0)
    status.failure = describe(*words_, "an operation");
}

}  // namespace expertwire::ep::cuda
