// What an object's runtime does about failure: what kernels report, whom the watcher has lost, and
// when to give up.

#include <atomic>

#include "base/check.hpp"
#include "ep/cuda/runtime/runtime.hpp"

namespace expertwire::inline v0::ep::cuda {

bool Runtime::awaits(int peer) { return std::atomic_ref(words_->awaited[peer]).exchange(0) != 0; }

void Runtime::lose(const Error& lost) {
  {
    std::lock_guard lock(mutex_);
    lost_ = lost;
  }
  std::atomic_ref(words_->abort).store(static_cast<std::uint32_t>(lost.peer()) + 1);
}

void Runtime::give_up(const char* operation, const Deadline& deadline) {
  throw_failure(operation);
  std::atomic_ref(words_->abort).store(HostWords::kGiveUp);
  const Error error(
      ErrorCode::timeout,
      fmt::format("{}: no answer from device {} within {} ms; has a kernel been stopped?",
                  operation, share_->device(), deadline.budget().count()),
      {object_.communicator()->rank(), -1, Phase::none});
  object_.fail(error);
  throw error;
}

std::string Runtime::describe_failure(const char* operation) const {
  const Failure& failure = words_->failure;
  const Phase phase = failure.phase;
  const bool row = phase == Phase::dispatch_rows || phase == Phase::combine_rows;
  const std::uint64_t waited_ms = failure.waited_ns / 1'000'000;
  switch (failure.code) {
    case ErrorCode::mismatch:
      return describe(operation, failure.mismatch, failure.peer, object_.communicator()->rank());
    case ErrorCode::peer_lost: {
      std::lock_guard lock(mutex_);
      return fmt::format("{} cannot go on, after {} ms of waiting ({}, {} {}): {}", operation,
                         waited_ms, to_string(phase), row ? "row" : "epoch", failure.detail,
                         lost_ ? lost_->what() : "it was given up");
    }
    default:
      return fmt::format(
          "{} waited {} ms for rank {} ({}, {} {}); is that rank alive, and does it "
          "make the same calls in the same order?",
          operation, waited_ms, failure.peer, to_string(phase), row ? "row" : "epoch",
          failure.detail);
  }
}

void Runtime::throw_failure(const char* operation) const {
  if (std::atomic_ref(words_->failed).load(std::memory_order_acquire) == 0) return;
  object_.check_usable();  // it has been thrown before
  const Error error = reported(operation);
  object_.fail(error);
  throw error;
}

Error Runtime::reported(const char* operation) const {
  const Failure& failure = words_->failure;
  return {failure.code,
          describe_failure(operation),
          {object_.communicator()->rank(), failure.peer, failure.phase}};
}

void Runtime::refresh(Status& status, int top_k) const {
  const DeviceGuard guard(share_->device());
  const cudaStream_t stream = share_->memory_stream().get();
  {
    std::lock_guard lock(mutex_);
    check_cuda(cudaMemcpyAsync(notices_, &kernel_words_->notices, sizeof(Notices),
                               cudaMemcpyDeviceToHost, stream),
               "cudaMemcpyAsync");
    check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    const Notices& seen = *notices_;
    status.invalid_expert_ids = static_cast<std::int64_t>(seen.invalid_ids);
    status.dropped_rows = static_cast<std::int64_t>(seen.dropped_rows);
    const auto k = static_cast<std::uint64_t>(top_k), at = std::uint64_t{seen.first_invalid_at};
    if (at > 0)
      status.first_invalid_id =
          fmt::format("topk_idx[{}, {}] = {}", (at - 1) / k, (at - 1) % k, seen.first_invalid_id);
  }
  if (!status.error && std::atomic_ref(words_->failed).load(std::memory_order_acquire) != 0)
    status.error = reported("an operation");
}

}  // namespace expertwire::ep::cuda
