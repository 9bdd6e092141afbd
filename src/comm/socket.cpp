#include "comm/socket.hpp"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#include "base/check.hpp"

namespace expertwire::inline v0 {

namespace {

/// The descriptors of this process that a forked child must close.
class OpenDescriptors {
 public:
  static OpenDescriptors& get() {
    static auto* all = new OpenDescriptors;  // outlives every Fd
    return *all;
  }
  void add(int fd) {
    std::lock_guard lock(mutex_);
    fds_.insert(fd);
  }
  /// Whether it was open here; a child's copies are not.
  bool remove(int fd) {
    std::lock_guard lock(mutex_);
    return fds_.erase(fd) > 0;
  }

 private:
  OpenDescriptors() {
    ::pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); },
                     [] {
                       for (int fd : get().fds_) ::close(fd);
                       get().fds_.clear();
                       get().mutex_.unlock();
                     });
  }

  std::mutex mutex_;
  std::set<int> fds_;
};

}  // namespace

Fd::Fd(int fd) : fd_(fd) {
  if (fd >= 0) OpenDescriptors::get().add(fd);
}

Fd& Fd::operator=(Fd&& other) noexcept {
  if (this != &other) {
    close();
    fd_ = std::exchange(other.fd_, -1);
  }
  return *this;
}

Fd::~Fd() { close(); }

void Fd::close() noexcept {
  if (fd_ >= 0 && OpenDescriptors::get().remove(fd_)) ::close(fd_);
  fd_ = -1;
}

int Fd::release() noexcept {
  if (fd_ >= 0) OpenDescriptors::get().remove(fd_);
  return std::exchange(fd_, -1);
}

namespace {

/// A socket address of either family.
struct Address {
  sockaddr_storage storage{};
  socklen_t length = 0;
  int family() const { return storage.ss_family; }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
};

Address local_address(const std::string& name) {
  Address address;
  sockaddr_un local{};
  local.sun_family = AF_UNIX;
  check_argument(name.size() < sizeof(local.sun_path), "the local socket name {} is too long",
                 name);
  // A leading zero byte in place of the '@' selects the abstract namespace.
  std::memcpy(local.sun_path + 1, name.data() + 1, name.size() - 1);
  std::memcpy(&address.storage, &local, sizeof(local));
  address.length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + name.size());
  return address;
}

Address tcp_address(const std::string& text) {
  const std::size_t colon = text.rfind(':');
  check_argument(colon != std::string::npos && colon > 0 && colon + 1 < text.size(),
                 "the rendezvous address '{}' must be host:port or @name", text);
  const std::string host = text.substr(0, colon), port = text.substr(colon + 1);
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int result = ::getaddrinfo(host.c_str(), port.c_str(), &hints, &found);
  check_argument(result == 0, "the rendezvous address '{}' cannot be resolved: {}", text,
                 ::gai_strerror(result));
  std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> owner(found, &::freeaddrinfo);
  Address address;
  std::memcpy(&address.storage, found->ai_addr, found->ai_addrlen);
  address.length = found->ai_addrlen;
  return address;
}

Address parse(const std::string& text) {
  return !text.empty() && text.front() == '@' ? local_address(text) : tcp_address(text);
}

Fd make_socket(int family) {
  Fd fd(check_system(::socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), "socket"));
  const int on = 1;
  if (family != AF_UNIX) {
    ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  }
  return fd;
}

/// Waits until `fd` is ready for `events`; false at the deadline.
bool wait_ready(int fd, short events, Deadline deadline) {
  for (;;) {
    pollfd entry{fd, events, 0};
    const auto left = deadline.remaining().count();
    const int timeout = static_cast<int>(std::min<std::int64_t>(left, INT_MAX));
    const int ready = ::poll(&entry, 1, timeout);
    if (ready > 0) return true;
    if (ready == 0) return false;
    if (errno != EINTR) throw_system("poll", errno);
  }
}

/// Tries once; returns 0 or an errno value. Does not block past the deadline.
int connect_once(int fd, const Address& address, Deadline deadline) {
  if (::connect(fd, address.get(), address.length) == 0) return 0;
  if (errno != EINPROGRESS) return errno;
  if (!wait_ready(fd, POLLOUT, deadline)) return ETIMEDOUT;
  int error = 0;
  socklen_t length = sizeof(error);
  ::getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length);
  return error;
}

bool would_block(int error) { return error == EAGAIN || error == EWOULDBLOCK || error == EINTR; }

/// Repeats a non-blocking `step(done)`, which returns what send or recv return, until `bytes` went.
template <class Step>
Transfer transfer_all(int fd, short events, std::size_t bytes, Deadline deadline, Step step) {
  for (std::size_t done = 0; done < bytes;) {
    const ssize_t count = step(done);
    if (count > 0) {
      done += static_cast<std::size_t>(count);
    } else if (count == 0 || !would_block(errno)) {
      return Transfer::closed;
    } else if (!wait_ready(fd, events, deadline)) {
      return Transfer::timed_out;
    }
  }
  return Transfer::done;
}

/// A message of one byte with room for one descriptor beside it.
struct DescriptorMessage {
  char byte = 0;
  iovec vector{&byte, 1};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))]{};
  msghdr header{};

  DescriptorMessage() {
    header.msg_iov = &vector;
    header.msg_iovlen = 1;
    header.msg_control = control;
    header.msg_controllen = sizeof(control);
  }
};

}  // namespace

Fd listen_on(const std::string& text) {
  const Address address = parse(text);
  Fd fd = make_socket(address.family());
  check(::bind(fd.get(), address.get(), address.length) == 0, ErrorCode::system,
        "cannot listen on {}: {}; is another job using this name?", text, std::strerror(errno));
  check_system(::listen(fd.get(), SOMAXCONN), "listen");
  return fd;
}

Fd connect_to(const std::string& text, Deadline deadline) {
  const Address address = parse(text);
  for (;;) {
    Fd fd = make_socket(address.family());
    const int error = connect_once(fd.get(), address, deadline);
    if (error == 0) return fd;
    check(!deadline.expired(), ErrorCode::timeout,
          "nobody answered at {} within {} ms ({}); is the rank that listens there running?", text,
          deadline.budget().count(), std::strerror(error));
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

Transfer send_all(int fd, const void* data, std::size_t bytes, Deadline deadline) {
  return transfer_all(fd, POLLOUT, bytes, deadline, [&](std::size_t done) {
    return ::send(fd, static_cast<const char*>(data) + done, bytes - done,
                  MSG_NOSIGNAL | MSG_DONTWAIT);
  });
}

Transfer receive_all(int fd, void* data, std::size_t bytes, Deadline deadline) {
  return transfer_all(fd, POLLIN, bytes, deadline, [&](std::size_t done) {
    return ::recv(fd, static_cast<char*>(data) + done, bytes - done, MSG_DONTWAIT);
  });
}

Transfer send_fd(int socket, int fd, Deadline deadline) {
  return transfer_all(socket, POLLOUT, 1, deadline, [&](std::size_t) {
    DescriptorMessage message;
    cmsghdr* control = CMSG_FIRSTHDR(&message.header);
    control->cmsg_level = SOL_SOCKET;
    control->cmsg_type = SCM_RIGHTS;
    control->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(control), &fd, sizeof(fd));
    return ::sendmsg(socket, &message.header, MSG_NOSIGNAL | MSG_DONTWAIT);
  });
}

Transfer receive_fd(int socket, Fd& fd, Deadline deadline) {
  return transfer_all(socket, POLLIN, 1, deadline, [&](std::size_t) {
    DescriptorMessage message;
    const ssize_t count = ::recvmsg(socket, &message.header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    const cmsghdr* control = count > 0 ? CMSG_FIRSTHDR(&message.header) : nullptr;
    if (count > 0) {
      check(control != nullptr && control->cmsg_type == SCM_RIGHTS, ErrorCode::system,
            "a descriptor that a peer passed did not arrive; is the limit on open files (ulimit "
            "-n) reached?");
      int received = -1;
      std::memcpy(&received, CMSG_DATA(control), sizeof(received));
      fd = Fd(received);
    }
    return count;
  });
}

}  // namespace expertwire
