#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace expertwire::inline v0 {

/// How device memory reaches other processes.
enum class CudaShare : std::int32_t {
  none,      ///< no device memory: the CPU backend
  posix_fd,  ///< cuMemCreate; a descriptor travels over a local socket
  fabric,    ///< cuMemCreate; a fabric handle travels as bytes
  ipc,       ///< cudaMalloc; a cudaIpc handle travels as bytes
};

/// What a rank of the CUDA backend tells of its device and its memory there.
struct CudaEndpoint {
  std::int32_t device;  ///< ordinal in its process; -1 on the CPU backend
  CudaShare share;
  std::array<unsigned char, 16> uuid;
  std::array<unsigned char, 64> handle;  ///< fabric or cudaIpc
  std::uint64_t segment;                 ///< id of the device memory within its process
  std::uint64_t arena_bytes;
};

/// What every rank tells all others when a communicator is made. Exchanged as bytes.
struct Endpoint {
  std::array<char, 32> version;
  std::array<char, 96> host;
  std::array<char, 48> link_address;  ///< local socket for descriptors and liveness
  std::uint64_t process;
  std::uint64_t segment;  ///< id of the arena's memory within its process
  std::uint64_t arena_bytes;
  std::int32_t rank;
  std::int32_t pid;
  std::int32_t cores;
  std::int32_t numa_node;
  std::int32_t ranks_per_node;
  std::int32_t wants_network;        ///< 1: it names pairs that are to go over the network
  std::array<char, 16> ucx_version;  ///< told later, and only if there is a need; else empty
  CudaEndpoint cuda;
};

}  // namespace expertwire
