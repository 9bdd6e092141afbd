#include "comm/transport/cuda_ipc/memory.hpp"

#include <cuda.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

#include "base/check.hpp"
#include "base/cuda.hpp"
#include "base/env.hpp"
#include "base/log.hpp"
#include "comm/device_memory.hpp"
#include "comm/segment.hpp"
#include "expertwire/communicator.hpp"

namespace expertwire::inline v0 {

namespace {

static_assert(sizeof(CUmemFabricHandle) <= sizeof(CudaEndpoint::handle));
static_assert(sizeof(cudaIpcMemHandle_t) <= sizeof(CudaEndpoint::handle));

/// The calls of the driver that the runtime does not have. Found at run time, so that the library
/// loads where there is no driver.
struct Driver {
  decltype(&cuMemCreate) create;
  decltype(&cuMemRelease) release;
  decltype(&cuMemAddressReserve) reserve;
  decltype(&cuMemAddressFree) unreserve;
  decltype(&cuMemMap) map;
  decltype(&cuMemUnmap) unmap;
  decltype(&cuMemSetAccess) set_access;
  decltype(&cuMemExportToShareableHandle) export_handle;
  decltype(&cuMemImportFromShareableHandle) import_handle;
  decltype(&cuMemRetainAllocationHandle) retain;
  decltype(&cuMemGetAllocationGranularity) granularity;
  decltype(&cuDeviceGetAttribute) attribute;
  decltype(&cuGetErrorString) error_string;
  decltype(&cuMemGetAddressRange) address_range;

  static const Driver& get() {
    static const Driver driver = load();
    return driver;
  }

 private:
  template <class Function>
  static void find(const char* name, Function& function) {
    constexpr unsigned kVersion = 12040;  // the oldest that has all of them
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check_cuda(cudaGetDriverEntryPointByVersion(name, &entry, kVersion, cudaEnableDefault, &found),
               "cudaGetDriverEntryPointByVersion");
    check(entry != nullptr, ErrorCode::unsupported, "the CUDA driver has no {}", name);
    function = reinterpret_cast<Function>(entry);
  }
  static Driver load() {
    Driver d{};
    find("cuMemCreate", d.create);
    find("cuMemRelease", d.release);
    find("cuMemAddressReserve", d.reserve);
    find("cuMemAddressFree", d.unreserve);
    find("cuMemMap", d.map);
    find("cuMemUnmap", d.unmap);
    find("cuMemSetAccess", d.set_access);
    find("cuMemExportToShareableHandle", d.export_handle);
    find("cuMemImportFromShareableHandle", d.import_handle);
    find("cuMemRetainAllocationHandle", d.retain);
    find("cuMemGetAllocationGranularity", d.granularity);
    find("cuDeviceGetAttribute", d.attribute);
    find("cuGetErrorString", d.error_string);
    find("cuMemGetAddressRange", d.address_range);
    return d;
  }
};

/// One thread at a time maps and unmaps: the driver was seen to corrupt its heap when thread ranks
/// unmapped two mappings of one allocation at once (driver 580).
std::recursive_mutex& mapping_mutex() {
  static auto* mutex = new std::recursive_mutex;  // outlives every mapping
  return *mutex;
}

void check_driver(CUresult result, const char* call) {
  if (result == CUDA_SUCCESS) [[likely]]
    return;
  const char* text = "unknown error";
  Driver::get().error_string(result, &text);
  throw Error(ErrorCode::system, fmt::format("{} failed: {}", call, text));
}

CUmemAllocationProp properties_of(int device, CUmemAllocationHandleType type) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device}};
  properties.requestedHandleTypes = type;
  return properties;
}

std::size_t rounded(int device, std::size_t bytes, CUmemAllocationHandleType type) {
  const CUmemAllocationProp properties = properties_of(device, type);
  std::size_t granularity = 1;
  check_driver(
      Driver::get().granularity(&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
      "cuMemGetAllocationGranularity");
  return (bytes + granularity - 1) / granularity * granularity;
}

void allow_access(std::byte* data, std::size_t bytes, int device) {
  const CUmemAccessDesc access{{CU_MEM_LOCATION_TYPE_DEVICE, {device}},
                               CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  check_driver(Driver::get().set_access(reinterpret_cast<CUdeviceptr>(data), bytes, &access, 1),
               "cuMemSetAccess");
}

/// Maps an allocation here and gives the handle up: the mapping keeps the memory.
std::shared_ptr<std::byte> map_allocation(CUmemGenericAllocationHandle allocation,
                                          std::size_t bytes, int device) {
  const Driver& driver = Driver::get();
  std::lock_guard lock(mapping_mutex());
  CUdeviceptr address = 0;
  CUresult result = driver.reserve(&address, bytes, 0, 0, 0);
  if (result == CUDA_SUCCESS) {
    result = driver.map(address, bytes, 0, allocation, 0);
    if (result != CUDA_SUCCESS) driver.unreserve(address, bytes);
  }
  driver.release(allocation);
  check_driver(result, "cuMemMap");
  std::shared_ptr<std::byte> mapping(reinterpret_cast<std::byte*>(address),
                                     [bytes](std::byte* data) {
                                       const auto at = reinterpret_cast<CUdeviceptr>(data);
                                       std::lock_guard unmapping(mapping_mutex());
                                       Driver::get().unmap(at, bytes);
                                       Driver::get().unreserve(at, bytes);
                                     });
  allow_access(mapping.get(), bytes, device);
  return mapping;
}

bool device_has(int device, CUdevice_attribute attribute) {
  int value = 0;
  return Driver::get().attribute(&value, attribute, device) == CUDA_SUCCESS && value != 0;
}

void create_mapped(DeviceSegment& segment, CUmemAllocationHandleType type) {
  const Driver& driver = Driver::get();
  CudaEndpoint& endpoint = segment.endpoint;
  endpoint.arena_bytes = rounded(endpoint.device, endpoint.arena_bytes, type);
  const CUmemAllocationProp properties = properties_of(endpoint.device, type);
  CUmemGenericAllocationHandle allocation = 0;
  check_driver(driver.create(&allocation, endpoint.arena_bytes, &properties, 0), "cuMemCreate");
  CUresult result = CUDA_SUCCESS;
  if (type == CU_MEM_HANDLE_TYPE_FABRIC) {
    result = driver.export_handle(endpoint.handle.data(), allocation, type, 0);
  } else {
    int fd = -1;
    result = driver.export_handle(&fd, allocation, type, 0);
    segment.fd = Fd(fd);
  }
  if (result != CUDA_SUCCESS) driver.release(allocation);
  check_driver(result, "cuMemExportToShareableHandle");
  segment.mapping = map_allocation(allocation, endpoint.arena_bytes, endpoint.device);
}

void create_ipc(DeviceSegment& segment) {
  void* data = nullptr;
  check_cuda(cudaMalloc(&data, segment.endpoint.arena_bytes), "cudaMalloc");
  const int device = segment.endpoint.device;
  segment.mapping = {static_cast<std::byte*>(data), [device](std::byte* p) {
                       const DeviceGuard on(device, std::nothrow);
                       cudaFree(p);
                     }};
  cudaIpcMemHandle_t handle{};
  check_cuda(cudaIpcGetMemHandle(&handle, data), "cudaIpcGetMemHandle");
  std::memcpy(segment.endpoint.handle.data(), &handle, sizeof(handle));
}

struct Way {
  CudaShare share;
  const char* name;
};
constexpr Way kWays[] = {
    {CudaShare::posix_fd, "posix_fd"}, {CudaShare::fabric, "fabric"}, {CudaShare::ipc, "ipc"}};

/// Why a way cannot be gone on this device, or nullptr.
const char* obstacle(CudaShare share, int device) {
  if (share == CudaShare::ipc) return nullptr;
  if (!device_has(device, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED))
    return "the device has no virtual memory management";
  if (share == CudaShare::posix_fd &&
      !device_has(device, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED))
    return "the device exports no descriptors";
  if (share == CudaShare::fabric &&
      !device_has(device, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED))
    return "the device exports no fabric handles";
  return nullptr;
}

void create_by(DeviceSegment& segment, CudaShare share) {
  segment.endpoint.share = share;
  if (share == CudaShare::ipc)
    create_ipc(segment);
  else
    create_mapped(segment, share == CudaShare::fabric ? CU_MEM_HANDLE_TYPE_FABRIC
                                                      : CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
}

}  // namespace

DeviceSegment create_device_segment(int device, std::size_t bytes) {
  int count = 0;
  check_cuda(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  check_argument(device >= 0 && device < count, "cuda_device is {}; it must be from 0 to {}",
                 device, count - 1);
  const DeviceGuard guard(device);
  check_cuda(cudaFree(nullptr), "making a CUDA context");
  DeviceSegment segment;
  segment.endpoint.device = device;
  cudaDeviceProp properties{};
  check_cuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  std::memcpy(segment.endpoint.uuid.data(), &properties.uuid, segment.endpoint.uuid.size());

  const std::string& wanted = Env::get().cuda_memory;
  std::string reasons;
  for (const Way& way : kWays) {
    if (wanted != "auto" && wanted != way.name) continue;
    std::string why;
    segment.endpoint.arena_bytes = bytes;
    if (const char* reason = obstacle(way.share, device)) {
      why = reason;
    } else {
      try {
        create_by(segment, way.share);
      } catch (const Error& error) {
        why = error.what();
      }
    }
    if (why.empty()) {
      log(LogLevel::info, Subsystem::mem, "device {}: an arena of {} bytes, shared by {}", device,
          segment.endpoint.arena_bytes, way.name);
      segment.endpoint.segment = register_mapping(segment.mapping);
      return segment;
    }
    log(LogLevel::debug, Subsystem::mem, "device {}: no memory by {}: {}", device, way.name, why);
    reasons += fmt::format("{}{}: {}", reasons.empty() ? "" : "; ", way.name, why);
  }
  throw Error(ErrorCode::capacity,
              fmt::format("device {} gave no arena of {} bytes ({}); a smaller arena_bytes or "
                          "EXPERTWIRE_ARENA_BYTES may help",
                          device, bytes, reasons),
              {-1, -1, Phase::setup});
}

std::size_t default_device_arena(int device) {
  constexpr std::size_t kUsual = std::size_t{2} << 30;
  const DeviceGuard guard(device);
  std::size_t free = 0, total = 0;
  check_cuda(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return std::min(kUsual, total / 16);
}

int cuda_device_count() noexcept {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

bool mps_runs() {
  const std::string folder = Env::get().mps_pipe;
  struct stat entry {};
  return ::stat((folder + "/control").c_str(), &entry) == 0;
}

Memory import_cuda_ipc(const ImportRequest& request) {
  const CudaEndpoint& peer = request.peer.cuda;
  const int device = request.self.cuda.device;
  const DeviceGuard guard(device);
  std::shared_ptr<std::byte> mapping;
  if (request.self.process == request.peer.process) {
    mapping = find_segment(peer.segment);
    check(mapping != nullptr, ErrorCode::peer_lost, "rank {} of this process has left",
          request.peer.rank);
    if (peer.device != device && peer.share == CudaShare::ipc) {
      const cudaError_t result = cudaDeviceEnablePeerAccess(peer.device, 0);
      if (result == cudaErrorPeerAccessAlreadyEnabled)
        cudaGetLastError();
      else
        check_cuda(result, "cudaDeviceEnablePeerAccess");
    } else if (peer.device != device) {
      // A mapping of this device's own; the peer's lives as long as it does.
      CUmemGenericAllocationHandle allocation = 0;
      check_driver(Driver::get().retain(&allocation, mapping.get()), "cuMemRetainAllocationHandle");
      mapping = map_allocation(allocation, peer.arena_bytes, device);
    }
  } else if (peer.share == CudaShare::ipc) {
    cudaIpcMemHandle_t handle{};
    std::memcpy(&handle, peer.handle.data(), sizeof(handle));
    void* data = nullptr;
    check_cuda(cudaIpcOpenMemHandle(&data, handle, cudaIpcMemLazyEnablePeerAccess),
               "cudaIpcOpenMemHandle");
    mapping = {static_cast<std::byte*>(data), [device](std::byte* p) {
                 const DeviceGuard on(device, std::nothrow);
                 cudaIpcCloseMemHandle(p);
               }};
  } else {
    const bool fabric = peer.share == CudaShare::fabric;
    void* source =
        fabric
            ? const_cast<unsigned char*>(peer.handle.data())
            : reinterpret_cast<void*>(static_cast<std::intptr_t>(request.device_descriptor.get()));
    CUmemGenericAllocationHandle allocation = 0;
    check_driver(Driver::get().import_handle(
                     &allocation, source,
                     fabric ? CU_MEM_HANDLE_TYPE_FABRIC : CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
                 "cuMemImportFromShareableHandle");
    mapping = map_allocation(allocation, peer.arena_bytes, device);
  }
  return {request.peer.rank, std::move(mapping), peer.arena_bytes, MemoryKind::cuda};
}

void offer_device_memory(MemoryOffer& offer) {
  void* const data = reinterpret_cast<void*>(offer.address);
  cudaPointerAttributes found{};
  check_cuda(cudaPointerGetAttributes(&found, data), "cudaPointerGetAttributes");
  check_argument(found.type == cudaMemoryTypeDevice,
                 "register_memory: {} is not memory of a CUDA device of this process",
                 static_cast<const void*>(data));
  offer.device = found.device;
  const DeviceGuard guard(found.device);
  CUdeviceptr base = 0;
  std::size_t bytes = 0;
  check_driver(Driver::get().address_range(&base, &bytes, offer.address), "cuMemGetAddressRange");
  offer.handle_offset = offer.address - base;
  check_argument(offer.handle_offset + offer.bytes <= bytes,
                 "register_memory: {} bytes at {} reach past the end of their allocation",
                 offer.bytes, static_cast<const void*>(data));
  cudaIpcMemHandle_t handle{};
  if (cudaIpcGetMemHandle(&handle, reinterpret_cast<void*>(base)) == cudaSuccess)
    std::memcpy(offer.handle.data(), &handle, sizeof(handle));
  else
    cudaGetLastError();  // memory of a pool, or of cuMemCreate: threads of this process reach it
}

namespace {

/// An allocation of another process, mapped once however many memories lie in it.
std::shared_ptr<std::byte> open_allocation(const MemoryOffer& offer, int device) {
  static std::mutex mutex;
  static auto* known = new std::map<decltype(offer.handle), std::weak_ptr<std::byte>>;
  std::lock_guard lock(mutex);
  if (auto mapping = (*known)[offer.handle].lock()) return mapping;
  cudaIpcMemHandle_t handle{};
  std::memcpy(&handle, offer.handle.data(), sizeof(handle));
  void* data = nullptr;
  check_cuda(cudaIpcOpenMemHandle(&data, handle, cudaIpcMemLazyEnablePeerAccess),
             "cudaIpcOpenMemHandle");
  std::shared_ptr<std::byte> mapping(static_cast<std::byte*>(data), [device](std::byte* p) {
    const DeviceGuard on(device, std::nothrow);
    cudaIpcCloseMemHandle(p);
  });
  (*known)[offer.handle] = mapping;
  return mapping;
}

}  // namespace

Memory open_cuda_ipc(const OpenRequest& request) {
  const MemoryOffer& offer = request.offer;
  if (offer.in_arena()) return part_of_arena(offer, request.arena);
  const int device = request.self.cuda.device;
  const DeviceGuard guard(device);
  if (request.self.process == request.peer.process) {
    if (offer.device != device) {
      const cudaError_t result = cudaDeviceEnablePeerAccess(offer.device, 0);
      if (result == cudaErrorPeerAccessAlreadyEnabled)
        cudaGetLastError();
      else
        check_cuda(result, "cudaDeviceEnablePeerAccess");
    }
    return {offer.rank, not_owned(offer.address), offer.bytes, MemoryKind::cuda};
  }
  check(offer.handle != decltype(offer.handle){}, ErrorCode::unsupported,
        "memory {} of rank {} cannot be shared between processes by CUDA; let rank {} take it from "
        "cudaMalloc, or from its arena",
        offer.id, offer.rank, offer.rank);
  const auto allocation = open_allocation(offer, device);
  return {offer.rank,
          std::shared_ptr<std::byte>(allocation, allocation.get() + offer.handle_offset),
          offer.bytes, MemoryKind::cuda};
}

}  // namespace expertwire
