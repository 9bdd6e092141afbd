#include "ep/cuda/runtime/runtime.hpp"

#include <algorithm>
#include <atomic>
#include <thread>

#include "base/check.hpp"
#include "base/cuda_event.hpp"
#include "base/env.hpp"
#include "comm/communicator_access.hpp"
#include "ep/cuda/runtime/trace.hpp"

namespace expertwire::inline v0::ep::cuda {

// Making and ending ------------------------------------------------------------------------------

Runtime::Runtime(Object& object, std::shared_ptr<Region> region, int lanes, int sms)
    : object_(object),
      region_(std::move(region)),
      share_(DeviceShare::of(*object.communicator())),
      kept_(std::make_shared<Kept>(Kept{region_, share_, {}})),
      couriers_(region_->staged_peers() > 0 ? 1 : 0) {
  check_argument(sms >= 0, "sms is {}; it must not be negative", sms);
  sms_ = sms == 0 ? share_->sms() : std::min(sms, share_->sms());
  check_sms_of_courier(sms_);
  const DeviceGuard guard(share_->device());
  keep(allocate_pinned(sizeof(HostWords)));
  words_ = static_cast<HostWords*>(kept_->memory.back().get());
  keep(allocate_pinned(sizeof(Notices)));
  notices_ = static_cast<Notices*>(kept_->memory.back().get());
  const cudaStream_t stream = share_->memory_stream().get();
  keep(allocate_on_device(sizeof(KernelWords), share_->device(), share_->memory_stream()));
  kernel_words_ = static_cast<KernelWords*>(kept_->memory.back().get());
  check_cuda(cudaMemsetAsync(kernel_words_, 0, sizeof(*kernel_words_), stream), "cudaMemsetAsync");
  check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  const Communicator& communicator = *object.communicator();
  for (int l = 0; l < lanes; ++l) {
    chains_.push_back(std::make_unique<Chain>(share_->device()));
    streams_.push_back(share_->take_stream());
    Context& context = contexts_.emplace_back();
    context.rank = communicator.rank();
    context.size = communicator.size();
    for (int r = 0; r < context.size; ++r) context.peers[r] = region_->peer(r, l);
    context.pairs = lane_base(l) + region_->pairs().of(0);
    context.pair_bytes = region_->pairs().bytes;
    context.couriers = couriers_;
    context.host = words_;
    context.words = kernel_words_;
  }
  share_->join(sms_ * lanes);
  CommunicatorAccess::watcher(*object.communicator()).add(*this);
}

/// The courier has an SM of its own.
void Runtime::check_sms_of_courier(int sms) const {
  check(couriers_ == 0 || sms > couriers_, ErrorCode::invalid_argument,
        "sms is {}; with peers that are reached through host memory (see doctor) it must be from "
        "{} to {}, for one SM carries what they say",
        sms, couriers_ + 1, share_->sms());
}

Runtime::~Runtime() {
  CommunicatorAccess::watcher(*object_.communicator()).remove(*this);
  share_->leave(sms_ * static_cast<int>(chains_.size()));
}

Allocator Runtime::allocator() const {
  return {[](void* self, const AllocationRequest& request) -> Allocation {
            const auto& share = *static_cast<const DeviceShare*>(self);
            const std::size_t bytes = std::max<std::size_t>(request.like.bytes(), 16);
            auto memory = allocate_on_device(bytes, share.device(), share.memory_stream());
            return {memory.get(), memory};
          },
          share_.get()};
}

bool Runtime::idle_by(Deadline deadline) const {
  const auto idle = [](const std::unique_ptr<Chain>& chain) { return chain->idle(); };
  for (;;) {
    if (std::all_of(chains_.begin(), chains_.end(), idle)) return true;
    if (deadline.expired()) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
}

bool Runtime::drain(Deadline deadline) {
  const DeviceGuard guard(share_->device());
  if (idle_by(deadline)) return true;
  std::atomic_ref(words_->abort).store(HostWords::kGiveUp);
  return idle_by(Deadline::after(std::chrono::milliseconds(1000)));
}

// Calls ------------------------------------------------------------------------------------------

cudaStream_t Runtime::stream_of(int lane, const Stream& stream) const {
  return stream.present() ? static_cast<cudaStream_t>(stream.cuda_handle())
                          : streams_[static_cast<std::size_t>(lane)].get();
}

Context Runtime::context_of(const Job& job) const {
  Context context = contexts_[static_cast<std::size_t>(job.lane)];
  context.trace = Trace::next(job.operation);
  const auto timeout = job.timeout.value_or(object_.communicator()->timeout());
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
        cudaMemcpyAsync(region_->peer(next, 0).lane + scratch.offset, lane_base(0) + scratch.offset,
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
  return region_->peer(object_.communicator()->rank(), lane).lane;
}

Epoch Runtime::read_epoch(const Job& job, std::uint64_t words) {
  const DeviceGuard guard(share_->device());
  // Replays on this stream may be on their way, and advance the epoch that is read.
  const cudaStream_t stream = stream_of(job.lane, job.stream);
  await_stream(job, stream);
  watch(job, [&] { return chains_[static_cast<std::size_t>(job.lane)]->idle(); });
  DirectionWords value{};
  check_cuda(cudaMemcpyAsync(&value, lane_base(job.lane) + words, sizeof(value),
                             cudaMemcpyDeviceToHost, share_->memory_stream().get()),
             "cudaMemcpyAsync");
  check_cuda(cudaStreamSynchronize(share_->memory_stream().get()), "cudaStreamSynchronize");
  return value.sent;
}

void check_limits(const Object& object, const MoeShape& shape) {
  const int ranks = object.communicator()->size();
  check(ranks <= kMostRanks, ErrorCode::unsupported,
        "{} ranks; the CUDA backend reaches at most {} by load and store", ranks, kMostRanks);
  check(shape.experts <= kMostExperts, ErrorCode::unsupported,
        "shape.experts is {}; the CUDA backend takes at most {}", shape.experts, kMostExperts);
}

void Runtime::begin(const Job& job, const StreamPlace& place) {
  throw_failure(job.operation);
  chains_[static_cast<std::size_t>(job.lane)]->enter(place);
  if (job.other_lane >= 0) chains_[static_cast<std::size_t>(job.other_lane)]->enter(place);
  share_->enter_order(place);
}

void Runtime::end(const Job& job, const StreamPlace& place) {
  share_->leave_order(place);
  chains_[static_cast<std::size_t>(job.lane)]->leave(place);
  if (job.other_lane >= 0) chains_[static_cast<std::size_t>(job.other_lane)]->leave(place);
  if (place.captured()) keep_for_capture(place);
}

void Runtime::keep_for_capture(const StreamPlace& place) {
  if (kept_for_ == place.capture) return;
  keep_with_graph(place, kept_);
  kept_for_ = place.capture;
}

void Runtime::await_stream(const Job& job, cudaStream_t stream) {
  watch(job, [stream] {
    const cudaError_t state = cudaStreamQuery(stream);
    if (state != cudaErrorNotReady) check_cuda(state, "cudaStreamQuery");
    return state == cudaSuccess;
  });
}

}  // namespace expertwire::ep::cuda
