#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "comm/memory_table.hpp"
#include "comm/proxy/carrier.hpp"
#include "comm/proxy/channel_table.hpp"
#include "comm/proxy/engine.hpp"
#include "comm/proxy/fifo.hpp"
#include "comm/proxy/poller.hpp"
#include "comm/wait.hpp"

namespace expertwire::inline v0 {

/// A thread that takes triggers from its queues and has them carried to the peers that it serves.
/// Never calls CUDA. For a second after the last trigger it looks all the time; then it sleeps, and
/// the process's Poller does its rounds.
class Proxy final : public Poller::Client {
 public:
  struct Setting {
    int index = 0;
    const MemoryTable* memories = nullptr;
    ChannelTable* channels = nullptr;
    /// By peer; null of peers that another proxy serves.
    std::vector<Carrier*> carriers;
    Engine* engine = nullptr;  ///< null: no peer is behind a network
    int kernels_device = -1;   ///< device whose kernels push; -1: none
    std::function<void(const std::string& why)> failed;
    int spins = 0;  ///< rounds without work before it first gives up the core
  };

  explicit Proxy(Setting setting);
  ~Proxy() override;

  /// By a CPU thread: queues a trigger and returns its position; waits while the queue is full.
  std::uint64_t push(const Trigger& trigger, const WaitContext& context, int peer);
  /// The queue that kernels push to; null without CUDA.
  const Fifo* for_kernels() const { return fifos_[1].get(); }
  /// Whether it sleeps and leaves its rounds to the Poller.
  bool parked() const { return parked_.load(); }
  /// Triggers taken so far.
  std::uint64_t taken() const { return taken_.load(std::memory_order_relaxed); }

  bool poll() noexcept override;
  void wake() noexcept override;

 private:
  void run();
  void park();
  void finish();
  /// What a round came to: `moved`, something did, if only a sign of life; `worked`, it was work.
  struct Round {
    bool moved = false, worked = false;
  };
  Round round();
  Round round_or_fail() noexcept;
  bool idle() const;
  bool drain(Fifo& fifo, bool kernels);
  bool has_room(const Trigger& trigger) const;
  void take(const Trigger& trigger, std::uint64_t position, bool kernels);
  void carry(ChannelState& channel, const Trigger& trigger);
  void carry_word(ChannelState& channel, std::uint64_t offset, std::uint64_t value);

  Setting setting_;
  std::vector<Carrier*> own_;                   // of the peers that it serves
  std::array<std::unique_ptr<Fifo>, 2> fifos_;  // of CPU threads, of kernels
  std::shared_ptr<Poller> poller_ = Poller::get();
  std::mutex rounds_;  // one at a time: by this thread or the poller's
  Carrier::Clock::time_point next_tick_{};
  std::atomic<std::uint64_t> taken_{0};
  std::atomic<bool> ending_{false}, parked_{false}, dead_{false};
  std::mutex sleep_mutex_;
  std::condition_variable woken_;
  bool wanted_ = false;
  std::thread thread_;
};

}  // namespace expertwire
