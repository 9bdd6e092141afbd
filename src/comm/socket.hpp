#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>

#include "expertwire/deadline.hpp"

namespace expertwire::inline v0 {

/// A file descriptor that closes itself, and that a forked child does not inherit: peers take a
/// socket's closing for the end of the process, and a child would keep it open. In the child it is
/// closed from the start.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd);
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept;
  ~Fd();

  int get() const noexcept { return fd_; }
  explicit operator bool() const noexcept { return fd_ >= 0; }
  int release() noexcept;

 private:
  void close() noexcept;
  int fd_ = -1;
};

/// Listens on "host:port" or "@name" (a local socket in the abstract namespace: no file).
Fd listen_on(const std::string& address);
/// Connects, trying again until the deadline while nobody listens there.
Fd connect_to(const std::string& address, Deadline deadline);

enum class Transfer { done, closed, timed_out };

/// Sends or receives exactly `bytes` bytes.
Transfer send_all(int fd, const void* data, std::size_t bytes, Deadline deadline);
Transfer receive_all(int fd, void* data, std::size_t bytes, Deadline deadline);

/// Passes a file descriptor over a local socket (SCM_RIGHTS).
Transfer send_fd(int socket, int fd, Deadline deadline);
Transfer receive_fd(int socket, Fd& fd, Deadline deadline);

}  // namespace expertwire
