#include "comm/proxy/proxy.hpp"

#include <pthread.h>
#include <sys/prctl.h>

#include "base/check.hpp"

namespace expertwire::inline v0 {

namespace {

constexpr int kBatch = 32;                                // triggers of a queue in a round
constexpr std::chrono::milliseconds kAwake{1000};         // after the last work
constexpr std::chrono::microseconds kYieldFor{200};       // then it sleeps between looks
constexpr std::chrono::microseconds kNap{40};             // so that a push is seen within 100 us
constexpr std::chrono::milliseconds kTick{1};             // between two looks at timers
constexpr std::chrono::milliseconds kMostFarewell{1000};  // for what is under way at the end

bool inside(const MemoryTable::Entry& entry, std::uint64_t offset, std::uint64_t bytes) {
  return offset <= entry.bytes && bytes <= entry.bytes - offset;
}

bool is_put(Operation operation) {
  return operation == Operation::put || operation == Operation::put_with_signal;
}

}  // namespace

Proxy::Proxy(Setting setting) : setting_(std::move(setting)) {
  for (Carrier* carrier : setting_.carriers)
    if (carrier != nullptr) own_.push_back(carrier);
  fifos_[0] = Fifo::for_threads();
  if (setting_.kernels_device >= 0) fifos_[1] = Fifo::for_kernels(setting_.kernels_device);
  thread_ = std::thread([this] { run(); });
}

Proxy::~Proxy() {
  ending_ = true;
  wake();
  thread_.join();
}

std::uint64_t Proxy::push(const Trigger& trigger, const WaitContext& context, int peer) {
  std::uint64_t position = 0;
  wait_until(context, peer, Phase::channel, trigger.channel,
             [&] { return fifos_[0]->try_push(trigger, &position); });
  return position;
}

void Proxy::run() {
  ::pthread_setname_np(::pthread_self(), fmt::format("ew-proxy-{}", setting_.index).c_str());
  ::prctl(PR_SET_TIMERSLACK, 1000UL);  // naps as short as they are meant
  int idle_rounds = 0;
  auto last_work = Carrier::Clock::now(), last_move = last_work;
  while (!ending_) {
    Round done;
    bool may_park = false;
    {
      std::lock_guard lock(rounds_);
      done = round_or_fail();
      may_park = !done.moved && idle();
    }
    if (done.worked) last_work = {};
    if (done.moved || done.worked) idle_rounds = 0;
    if (++idle_rounds <= setting_.spins) continue;
    const auto now = Carrier::Clock::now();
    if (last_work == Carrier::Clock::time_point{}) last_work = now;
    if (idle_rounds == setting_.spins + 1) last_move = now;
    if (now - last_move < kYieldFor) {
      std::this_thread::yield();
    } else if (now - last_work < kAwake || !may_park) {
      std::this_thread::sleep_for(kNap);
    } else {
      park();
      last_work = {};  // what woke it was work
      idle_rounds = 0;
    }
  }
  std::lock_guard lock(rounds_);
  finish();
}

void Proxy::park() {
  {
    std::lock_guard lock(sleep_mutex_);
    wanted_ = false;
  }
  parked_ = true;
  poller_->add(*this);
  {
    std::unique_lock lock(sleep_mutex_);
    woken_.wait(lock, [this] { return wanted_ || ending_.load(); });
  }
  poller_->remove(*this);
  parked_ = false;
}

bool Proxy::poll() noexcept {
  std::lock_guard lock(rounds_);
  return round_or_fail().worked;
}

bool Proxy::idle() const {
  for (const Carrier* carrier : own_)
    if (!carrier->idle()) return false;
  return true;
}

void Proxy::wake() noexcept {
  {
    std::lock_guard lock(sleep_mutex_);
    wanted_ = true;
  }
  woken_.notify_one();
}

/// What is queued and under way goes out; then peers are told that nothing follows. Bounded.
void Proxy::finish() {
  const auto until = Carrier::Clock::now() + kMostFarewell;
  auto settle = [&] {
    while (!dead_ && Carrier::Clock::now() < until) {
      const Round done = round_or_fail();
      if (!done.worked && idle()) return;
      if (!done.moved) std::this_thread::yield();
    }
  };
  settle();
  for (Carrier* carrier : own_)
    if (!dead_) carrier->say_goodbye();
  settle();
}

Proxy::Round Proxy::round_or_fail() noexcept {
  if (dead_) return {};
  try {
    return round();
  } catch (const std::exception& error) {
    dead_ = true;
    try {
      setting_.failed(fmt::format("proxy {} failed: {}", setting_.index, error.what()));
    } catch (const std::exception&) {  // no memory to say so: waits then end at their deadlines
    }
    return {};
  }
}

Proxy::Round Proxy::round() {
  Round done;
  if (drain(*fifos_[0], false)) done.worked = true;
  if (fifos_[1] && drain(*fifos_[1], true)) done.worked = true;
  for (Carrier* carrier : own_)
    if (carrier->progress()) done.worked = true;
  done.moved = done.worked;
  if (setting_.engine != nullptr && setting_.engine->progress()) done.moved = true;
  const auto now = Carrier::Clock::now();
  if (now < next_tick_) return done;
  next_tick_ = now + kTick;
  for (Carrier* carrier : own_) carrier->tick(now);
  return done;
}

bool Proxy::drain(Fifo& fifo, bool kernels) {
  int count = 0;
  for (; count < kBatch; ++count) {
    const Trigger* trigger = fifo.front();
    if (trigger == nullptr || !has_room(*trigger)) break;
    const Trigger copy = *trigger;
    const std::uint64_t position = fifo.position();
    fifo.pop();
    take(copy, position, kernels);
  }
  if (count > 0)
    taken_.store(taken_.load(std::memory_order_relaxed) + static_cast<unsigned>(count),
                 std::memory_order_relaxed);
  return count > 0;
}

bool Proxy::has_room(const Trigger& trigger) const {
  const ChannelState* channel = setting_.channels->find(trigger.channel);
  if (channel == nullptr) return true;
  const Carrier* carrier = setting_.carriers[static_cast<std::size_t>(channel->peer)];
  return carrier == nullptr || carrier->has_room();
}

void Proxy::take(const Trigger& trigger, std::uint64_t position, bool kernels) {
  ChannelState* const channel = setting_.channels->find(trigger.channel);
  if (channel == nullptr) {
    // A kernel with a handle of a channel that is gone: nobody is left who could be told.
    setting_.failed(
        fmt::format("a trigger names channel {}, which does not exist or has been "
                    "closed; was a kernel still using its handle?",
                    trigger.channel));
    return;
  }
  Carrier& carrier = *setting_.carriers[static_cast<std::size_t>(channel->peer)];
  switch (trigger.operation) {
    case Operation::flush: {
      std::uint64_t* const word = kernels ? channel->flushed_kernels.get() : &channel->flushed;
      return carrier.flush({word, position + 1});
    }
    case Operation::leave:
      carry_word(*channel, channel->farewell_offset, 1);
      channel->left.store(true, std::memory_order_release);
      return;
    case Operation::signal:
      return carry_word(*channel, channel->semaphore_offset, ++channel->signalled);
    default:
      return carry(*channel, trigger);
  }
}

void Proxy::carry_word(ChannelState& channel, std::uint64_t offset, std::uint64_t value) {
  Cargo cargo;
  cargo.operation = Operation::store;
  cargo.destination = setting_.memories->find(channel.semaphore);
  cargo.offset = offset;
  cargo.value = static_cast<std::int64_t>(value);
  setting_.carriers[static_cast<std::size_t>(channel.peer)]->carry(cargo);
}

/// CPU threads have checked what they push; kernels have not, so all is checked here.
void Proxy::carry(ChannelState& channel, const Trigger& t) {
  const auto refuse = [&](const std::string& why) {
    channel.fail(Error(ErrorCode::invalid_argument,
                       fmt::format("a trigger of channel {} to rank {} was refused: {}", channel.id,
                                   channel.peer, why),
                       {-1, channel.peer, Phase::channel}));
  };
  const MemoryTable::Entry* to = setting_.memories->find(t.destination);
  if (to == nullptr || to->rank != channel.peer)
    return refuse(fmt::format("destination {} is no memory of that rank", t.destination));
  if (to->kind != MemoryKind::host && to->data == nullptr)
    return refuse(fmt::format("destination {} is device memory, which networks do not reach yet",
                              t.destination));
  const bool put = is_put(t.operation);
  if (!inside(*to, t.destination_offset, put ? t.bytes : sizeof(std::uint64_t)))
    return refuse(fmt::format("offset {} lies outside the destination of {} bytes",
                              t.destination_offset, to->bytes));
  if (!put && t.destination_offset % sizeof(std::uint64_t) != 0)
    return refuse(fmt::format("the word's offset {} is no multiple of 8", t.destination_offset));
  if (!put && t.operation != Operation::atomic_add && t.operation != Operation::store)
    return refuse(fmt::format("there is no operation {}", static_cast<unsigned>(t.operation)));
  Cargo cargo;
  cargo.operation = put ? Operation::put : t.operation;
  cargo.destination = to;
  cargo.offset = t.destination_offset;
  cargo.value = t.value;
  if (put) {
    const MemoryTable::Entry* from = setting_.memories->find(t.source);
    if (from == nullptr || from->data == nullptr || !inside(*from, t.source_offset, t.bytes))
      return refuse(fmt::format("{} bytes at {} are no part of source {}", t.bytes, t.source_offset,
                                t.source));
    if (from->kind != MemoryKind::host && to->data == nullptr)
      return refuse(
          fmt::format("source {} is device memory, which does not go over networks yet", t.source));
    cargo.source = from->data + t.source_offset;
    cargo.source_kind = from->kind;
    cargo.bytes = t.bytes;
  }
  setting_.carriers[static_cast<std::size_t>(channel.peer)]->carry(cargo);
  if (t.operation == Operation::put_with_signal)
    carry_word(channel, channel.semaphore_offset, ++channel.signalled);
}

}  // namespace expertwire
