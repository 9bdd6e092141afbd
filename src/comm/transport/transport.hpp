#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "comm/endpoint.hpp"
#include "comm/memory_offer.hpp"
#include "comm/socket.hpp"
#include "expertwire/connection.hpp"
#include "expertwire/memory.hpp"

namespace expertwire::inline v0 {

/// Whether a transport reaches a peer, and a few words why (not), for the banner.
struct Reach {
  bool possible = false;
  std::string why;
};

/// What a transport needs to map a peer's arena.
struct ImportRequest {
  const Endpoint& self;
  const Endpoint& peer;
  const Fd& descriptor;  ///< of the peer's host memory; empty when the peer is in this process
  const Fd& device_descriptor;  ///< of its device memory, the same; for CudaShare::posix_fd
};

/// What a transport needs to reach memory that its owner has registered.
struct OpenRequest {
  const Endpoint& self;
  const Endpoint& peer;
  const MemoryOffer& offer;
  const Memory& arena;  ///< the owner's arena of that kind of memory, as it is reached here
};

/// A kind of wire. The communicator asks the transports in order and takes the first that reaches.
/// Each has a folder with the same file names: memory.cpp maps, transport.cpp reaches and connects.
class Transport {
 public:
  Transport() = default;
  Transport(const Transport&) = delete;
  Transport& operator=(const Transport&) = delete;
  virtual ~Transport() = default;

  virtual std::string_view name() const noexcept = 0;
  /// The kind of memory that it maps.
  virtual MemoryKind kind() const noexcept = 0;
  virtual Reach reach(const Endpoint& self, const Endpoint& peer) const = 0;
  virtual Memory import(const ImportRequest& request) const = 0;
  /// Throws `Error{unsupported}` with what to do if this wire does not reach it.
  virtual Memory open(const OpenRequest& request) const = 0;
  virtual std::unique_ptr<Connection> connect(const Endpoint& self, int peer) const = 0;
};

std::unique_ptr<Transport> make_loopback_transport();
std::unique_ptr<Transport> make_shm_transport();
/// Null in builds without CUDA.
std::unique_ptr<Transport> make_cuda_ipc_transport();
std::unique_ptr<Transport> make_staged_transport();
/// Null in builds without the headers of UCX. Its connections are made by Proxies.
std::unique_ptr<Transport> make_ucx_transport();

/// All transports of this build, the one to prefer first.
std::vector<std::unique_ptr<Transport>> make_transports();

}  // namespace expertwire
