#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "comm/device_words.hpp"
#include "comm/proxy/carrier.hpp"

namespace expertwire::inline v0 {

/// A thread that copies to and from device memory for the proxies of a rank, in the order in which
/// it is asked: proxies call no CUDA. Copies and words go through one stream of its own.
class Copier {
 public:
  /// `failed` is called once, if CUDA refuses; what comes after is dropped.
  Copier(int device, std::function<void(const std::string& why)> failed);
  Copier(const Copier&) = delete;
  Copier& operator=(const Copier&) = delete;
  /// Finishes what it was asked for.
  ~Copier();

  struct Job {
    Cargo cargo;
    FlushMark mark;                                ///< of a flush
    std::shared_ptr<std::atomic<int>> unfinished;  ///< counted down when it is done
  };
  void push(Job job);
  bool full() const { return length_.load(std::memory_order_relaxed) >= kMostQueued; }

 private:
  static constexpr int kMostQueued = 4096;
  void run();
  void do_job(const Job& job);

  DeviceWords words_;
  std::function<void(const std::string&)> failed_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;
  std::atomic<int> length_{0};
  bool ending_ = false, broken_ = false;
  std::thread thread_;
};

/// To a peer whose memory, of host or device, is mapped here. What concerns host memory alone is
/// done at once, unless something for the copier comes before it.
class DeviceCarrier final : public Carrier {
 public:
  explicit DeviceCarrier(std::shared_ptr<Copier> copier) : copier_(std::move(copier)) {}

  bool has_room() const override { return !copier_->full(); }
  void carry(const Cargo& cargo) override;
  void flush(const FlushMark& mark) override;
  bool idle() const override { return *unfinished_ == 0; }

 private:
  void hand_over(const Cargo& cargo, const FlushMark& mark);

  std::shared_ptr<Copier> copier_;
  std::shared_ptr<std::atomic<int>> unfinished_ = std::make_shared<std::atomic<int>>(0);
};

}  // namespace expertwire
