#include "comm/transport/transport.hpp"

#include "base/cuda.hpp"
#include "comm/device_memory.hpp"
#include "comm/device_words.hpp"
#include "comm/transport/cuda_ipc/memory.hpp"

namespace expertwire {

namespace {

/// A connection to a peer whose device memory is mapped here.
///
/// Ordering: everything goes through one stream; a signal or add runs after the copies before it
/// have completed, and releases at system scope. Completion: when the stream is empty.
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
    words_.set(reinterpret_cast<std::uint64_t*>(r.destination.data() + r.destination_offset),
               r.value);
  }
  void do_atomic_add(const AtomicAddRequest& r) override {
    words_.add(reinterpret_cast<std::uint64_t*>(r.destination.data() + r.destination_offset),
               r.value);
  }
  void do_flush(Deadline deadline) override { words_.flush(deadline); }

  int peer_;
  DeviceWords words_;
};

/// Reaches the device memory of ranks on this host: threads of this process or other processes, on
/// this GPU or on one that it can read and write.
class CudaIpcTransport final : public Transport {
 public:
  std::string_view name() const noexcept override { return "cuda_ipc"; }
  MemoryKind kind() const noexcept override { return MemoryKind::cuda; }

  Reach reach(const Endpoint& self, const Endpoint& peer) const override {
    if (self.host != peer.host) return {false, "another host"};
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
  std::unique_ptr<Connection> connect(const Endpoint& self, int peer) const override {
    return std::make_unique<CudaIpcConnection>(peer, self.cuda.device);
  }
};

}  // namespace

std::unique_ptr<Transport> make_cuda_ipc_transport() {
  return std::make_unique<CudaIpcTransport>();
}

}  // namespace expertwire
