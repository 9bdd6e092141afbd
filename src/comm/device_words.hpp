#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

#include "expertwire/deadline.hpp"

struct CUstream_st;

namespace expertwire::inline v0 {

/// The host's hand in device memory: copies and words, in the order of one stream of its own.
/// A word set or added to is released at system scope after everything that came before it.
/// Not for hot paths: every call is a copy or a launch. Any thread may call. The stream is made at
/// the first call: a device has few queues, and streams that share one can wait for each other.
class DeviceWords {
 public:
  explicit DeviceWords(int device);
  DeviceWords(const DeviceWords&) = delete;
  DeviceWords& operator=(const DeviceWords&) = delete;
  ~DeviceWords();

  /// Between memories of any kind that this device reaches; queued.
  void copy(void* to, const void* from, std::size_t bytes) const;
  void set(std::uint64_t* word, std::uint64_t value) const;  ///< queued
  void add(std::uint64_t* word, std::int64_t value) const;   ///< queued
  void zero(void* data, std::size_t bytes) const;            ///< queued
  std::uint64_t read(const std::uint64_t* word) const;       ///< waits
  /// Waits for what is queued; throws `Error{timeout}` at the deadline.
  void flush(Deadline deadline) const;

 private:
  CUstream_st* stream() const;

  int device_;
  mutable std::once_flag made_;
  mutable std::shared_ptr<CUstream_st> stream_;
};

}  // namespace expertwire
