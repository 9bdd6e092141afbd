#pragma once

#include <cstddef>
#include <memory>

#include "comm/endpoint.hpp"
#include "comm/memory_offer.hpp"
#include "comm/socket.hpp"

namespace expertwire::inline v0 {

/// Memory of a CUDA device that other processes can map.
struct DeviceSegment {
  CudaEndpoint endpoint{-1, CudaShare::none, {}, {}, 0, 0};  ///< what peers are told
  Fd fd;                                                     ///< for CudaShare::posix_fd
  std::shared_ptr<std::byte> mapping;
};

/// Takes `bytes` of `device` by the best way that the machine grants, or by the one that
/// EXPERTWIRE_CUDA_MEMORY names. Throws `Error{unsupported}` in builds without CUDA, and
/// `Error{invalid_argument}` if there is no such device.
DeviceSegment create_device_segment(int device, std::size_t bytes);

/// Adds to the offer of a user's device memory how other processes map it; nothing is added if
/// CUDA cannot share it. Throws `Error{invalid_argument}` if it is no memory of a device that this
/// process sees.
void offer_device_memory(MemoryOffer& offer);

/// Bytes of an arena on `device` when nobody says how many.
std::size_t default_device_arena(int device);

/// Whether an MPS daemon serves this user: only then do processes share a GPU at the same time.
bool mps_runs();

}  // namespace expertwire
