#include "comm/proxy/copier.hpp"

#include <pthread.h>

#include <exception>

#include "base/env.hpp"
#include "comm/proxy/mapped_carrier.hpp"

namespace expertwire::inline v0 {

Copier::Copier(int device, std::function<void(const std::string& why)> failed)
    : words_(device), failed_(std::move(failed)), thread_([this] { run(); }) {}

Copier::~Copier() {
  {
    std::lock_guard lock(mutex_);
    ending_ = true;
  }
  changed_.notify_one();
  thread_.join();
}

void Copier::push(Job job) {
  {
    std::lock_guard lock(mutex_);
    jobs_.push_back(std::move(job));
    ++length_;
  }
  changed_.notify_one();
}

void Copier::run() {
  ::pthread_setname_np(::pthread_self(), "ew-copier");
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return ending_ || !jobs_.empty(); });
    if (jobs_.empty()) return;
    const Job job = std::move(jobs_.front());
    jobs_.pop_front();
    lock.unlock();
    try {
      if (!broken_) do_job(job);
    } catch (const std::exception& error) {
      broken_ = true;
      try {
        failed_(std::string("copying for a port channel failed: ") + error.what());
      } catch (const std::exception&) {  // no memory to say so: waits end at their deadlines
      }
    }
    --*job.unfinished;
    --length_;
    lock.lock();
  }
}

void Copier::do_job(const Job& job) {
  const Cargo& cargo = job.cargo;
  const auto drain = [this] {
    words_.flush(Deadline::after(std::chrono::milliseconds(Env::get().timeout_ms)));
  };
  if (cargo.operation == Operation::flush) {
    drain();
    return release_mark(job.mark);
  }
  std::byte* to = cargo.destination->data + cargo.offset;
  if (cargo.operation == Operation::put) return words_.copy(to, cargo.source, cargo.bytes);
  auto* word = reinterpret_cast<std::uint64_t*>(to);
  if (cargo.destination->kind == MemoryKind::host) {
    drain();  // a word of host memory is the host's to write, once the copies before it are done
    apply_to_word(to, cargo.operation, cargo.value);
  } else if (cargo.operation == Operation::store) {
    words_.set(word, static_cast<std::uint64_t>(cargo.value));
  } else {
    words_.add(word, cargo.value);
  }
}

void DeviceCarrier::carry(const Cargo& cargo) {
  const bool host = cargo.destination->kind == MemoryKind::host &&
                    (cargo.operation != Operation::put || cargo.source_kind == MemoryKind::host);
  if (!host || unfinished_->load(std::memory_order_acquire) > 0) return hand_over(cargo, {});
  MappedCarrier().carry(cargo);
}

void DeviceCarrier::flush(const FlushMark& mark) {
  if (unfinished_->load(std::memory_order_acquire) == 0) return release_mark(mark);
  Cargo cargo;
  cargo.operation = Operation::flush;
  hand_over(cargo, mark);
}

void DeviceCarrier::hand_over(const Cargo& cargo, const FlushMark& mark) {
  ++*unfinished_;
  copier_->push({cargo, mark, unfinished_});
}

}  // namespace expertwire
