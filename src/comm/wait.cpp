#include "comm/wait.hpp"

#include <thread>

#include "base/check.hpp"

namespace expertwire::inline v0 {

namespace {

constexpr std::chrono::milliseconds kYieldFor{5};  // after that, sleep between polls
constexpr std::chrono::microseconds kSleep{50};
constexpr std::uint32_t kYieldsPerLook = 64;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

bool Patience::pause() {
  if (spins_left_ > 0) {
    --spins_left_;
    relax();
    return false;
  }
  const bool look = ++yields_ % kYieldsPerLook == 0;
  const auto now = look ? std::chrono::steady_clock::now() : start_;
  if (look && start_ == std::chrono::steady_clock::time_point{}) start_ = now;
  if (yields_ > kYieldsPerLook && look && now - start_ > kYieldFor) {
    std::this_thread::sleep_for(kSleep);
    yields_ = 2 * kYieldsPerLook - 1;  // from here on every pause looks and sleeps
    return true;
  }
  std::this_thread::yield();
  return look;
}

namespace {

const char* name_of_detail(Phase phase) {
  if (phase == Phase::dispatch_rows || phase == Phase::combine_rows) return "row";
  return phase == Phase::channel ? "message" : "epoch";
}

}  // namespace

void throw_timeout(const WaitContext& context, int peer, Phase phase, std::uint64_t detail) {
  throw Error(ErrorCode::timeout,
              fmt::format("{} waited {} ms for rank {} ({} {}); is that rank alive, and does it "
                          "make the same calls in the same order?",
                          context.operation, context.deadline.budget().count(), peer,
                          name_of_detail(phase), detail),
              {context.communicator->rank(), peer, phase});
}

void throw_abandoned(const WaitContext& context, int peer, Phase phase) {
  throw Error(ErrorCode::failed_earlier,
              fmt::format("{}: another thread of this rank failed", context.operation),
              {context.communicator->rank(), peer, phase});
}

void throw_lost(const WaitContext& context, const Error& lost, Phase phase) {
  throw Error(ErrorCode::peer_lost,
              fmt::format("{} cannot go on: {}", context.operation, lost.what()),
              {context.communicator->rank(), lost.peer(), phase});
}

}  // namespace expertwire
