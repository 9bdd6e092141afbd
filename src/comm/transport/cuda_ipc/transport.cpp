#include "comm/transport/transport.hpp"

#include <array>
#include <atomic>
#include <cstring>

#include "base/cuda.hpp"
#include "base/env.hpp"
#include "comm/device_memory.hpp"
#include "comm/device_words.hpp"
#include "comm/transport/cuda_ipc/memory.hpp"

namespace expertwire::inline v0 {

namespace {

/// A connection to a peer whose device memory, and host memory, is mapped here.
///
/// Ordering: everything goes through one stream; a signal or add runs after the copies before it
/// have completed, and releases at system scope. Words of host memory are the host's to write, once
/// the stream is empty. Completion: when the stream is empty.
class CudaIpcConnection final : public Connection {
 public:
  CudaIpcConnection(int peer, int device) : peer_(peer), words_(device) {}

  int peer() const noexcept override { return peer_; }
  std::string_view transport() const noexcept override { return "cuda_ipc"; }

 private:
  void do_put(const PutRequest& r) override {
    words_.copy(r.destination.data() + r.destination_offset, r.source.data() + r.source_offset,
                r.bytes);
  }
  void do_signal(const SignalRequest& r) override {
    std::uint64_t* word = word_of(r.destination, r.destination_offset);
    if (r.destination.kind() == MemoryKind::cuda) return words_.set(word, r.value);
    await_puts();
    std::atomic_ref(*word).store(r.value, std::memory_order_release);
  }
  void do_atomic_add(const AtomicAddRequest& r) override {
    std::uint64_t* word = word_of(r.destination, r.destination_offset);
    if (r.destination.kind() == MemoryKind::cuda) return words_.add(word, r.value);
    await_puts();
    std::atomic_ref(*word).fetch_add(static_cast<std::uint64_t>(r.value),
                                     std::memory_order_acq_rel);
  }
  void await_puts() const {
    words_.flush(Deadline::after(std::chrono::milliseconds(Env::get().timeout_ms)));
  }
  static std::uint64_t* word_of(const Memory& memory, std::uint64_t offset) {
    return reinterpret_cast<std::uint64_t*>(memory.data() + offset);
  }
  void do_flush(Deadline deadline) override { words_.flush(deadline); }

  int peer_;
  DeviceWords words_;
};

/// The device with that id, if this process sees it; else -1.
int ordinal_of(const std::array<unsigned char, 16>& uuid) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) return -1;
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties{};
    if (cudaGetDeviceProperties(&properties, device) == cudaSuccess &&
        std::memcmp(&properties.uuid, uuid.data(), uuid.size()) == 0)
      return device;
  }
  return -1;
}

/// Reaches the device memory of ranks on this host: threads of this process or other processes, on
/// this GPU or on one that it can read and write.
class CudaIpcTransport final : public Transport {
 public:
  std::string_view name() const noexcept override { return "cuda_ipc"; }
  MemoryKind kind() const noexcept override { return MemoryKind::cuda; }

  Reach reach(const Endpoint& self, const Endpoint& peer) const override {
    if (self.host != peer.host) {
      const bool fabric =
          self.cuda.share == CudaShare::fabric && peer.cuda.share == CudaShare::fabric;
      return {fabric, fabric ? "another host, memory by fabric handle" : "another host"};
    }
    const bool same_process = self.process == peer.process;
    if (self.cuda.uuid == peer.cuda.uuid) {
      if (same_process) return {true, "same GPU"};
      if (mps_runs()) return {true, "same GPU, MPS"};
      return {false,
              "another process on the same GPU, where two processes take turns unless MPS runs: "
              "give each process a GPU of its own, use threads, or start nvidia-cuda-mps-control"};
    }
    if (same_process) {
      int can = 0;
      cudaDeviceCanAccessPeer(&can, self.cuda.device, peer.cuda.device);
      return {can != 0, can != 0 ? "same process, peer access" : "no peer access between the GPUs"};
    }
    if (const int ordinal = ordinal_of(peer.cuda.uuid); ordinal >= 0) {
      int can = 0;
      cudaDeviceCanAccessPeer(&can, self.cuda.device, ordinal);
      if (can == 0) return {false, "no peer access between the GPUs"};
    }
    switch (peer.cuda.share) {
      case CudaShare::posix_fd:
        return {true, "same host, memory by descriptor"};
      case CudaShare::fabric:
        return {true, "same host, memory by fabric handle"};
      case CudaShare::ipc:
        return {true, "same host, memory by cudaIpc"};
      case CudaShare::none:
        break;
    }
    return {false, "no device memory"};
  }
  Memory import(const ImportRequest& request) const override { return import_cuda_ipc(request); }
  Memory open(const OpenRequest& request) const override { return open_cuda_ipc(request); }
  std::unique_ptr<Connection> connect(const Endpoint& self, int peer) const override {
    return std::make_unique<CudaIpcConnection>(peer, self.cuda.device);
  }
};

}  // namespace

std::unique_ptr<Transport> make_cuda_ipc_transport() {
  return std::make_unique<CudaIpcTransport>();
}

}  // namespace expertwire
