#include <cuda_runtime_api.h>

#include <algorithm>
#include <vector>

#include "base/cuda.hpp"
#include "base/env.hpp"
#include "comm/device_memory.hpp"
#include "comm/shared_block.hpp"
#include "device/limits.hpp"
#include "doctor_findings.hpp"
#include "expertwire/communicator.hpp"

namespace expertwire::tools {

namespace {

const char* name_of(CudaShare share) {
  switch (share) {
    case CudaShare::posix_fd:
      return "cuMemCreate, shared by descriptor";
    case CudaShare::fabric:
      return "cuMemCreate, shared by fabric handle";
    case CudaShare::ipc:
      return "cudaMalloc, shared by cudaIpc";
    case CudaShare::none:
      break;
  }
  return "none";
}

bool find_devices(Findings& findings, int& count) {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  findings.fact("CUDA", "runtime {}.{}, driver for up to {}.{}", runtime / 1000,
                runtime % 1000 / 10, driver / 1000, driver % 1000 / 10);
  const cudaError_t result = cudaGetDeviceCount(&count);
  if (result == cudaSuccess && count > 0) return true;
  if (driver == 0)
    findings.fact("GPUs", "none: there is no NVIDIA driver here; the CPU backend works without");
  else if (driver < runtime / 1000 * 1000)
    findings.problem("the driver is older than this build's CUDA",
                     "a driver for this CUDA, or a build with the driver's");
  else
    findings.fact("GPUs", "none seen ({}); CUDA_VISIBLE_DEVICES?", cudaGetErrorString(result));
  return false;
}

void examine_device(Findings& findings, int device) {
  cudaDeviceProp p{};
  check_cuda(cudaGetDeviceProperties(&p, device), "cudaGetDeviceProperties");
  findings.fact(fmt::format("GPU {}", device).c_str(), "{}, compute {}.{}, {} SMs, {:.0f} GiB",
                p.name, p.major, p.minor, p.multiProcessorCount,
                static_cast<double>(p.totalGlobalMem) / (1 << 30));
  if (p.major < 8)
    findings.problem("kernels are built for compute 8.0 and later",
                     "the CPU backend, or another GPU");
  findings.fact("  rows move by", "{}",
                p.major >= 9 && Env::get().cuda_copies != "vector" ? "bulk copies"
                                                                   : "16-byte loads and stores");
  try {
    const DeviceSegment segment = create_device_segment(device, std::size_t{2} << 20);
    findings.fact("  memory", "{}", name_of(segment.endpoint.share));
  } catch (const std::exception& error) {
    findings.problem(error.what(), "EXPERTWIRE_CUDA_MEMORY=auto, or a free GPU");
  }
}

void examine_peers(Findings& findings, int count) {
  bool apart = false;
  for (int a = 0; a < count; ++a) {
    std::string row;
    for (int b = 0; b < count; ++b) {
      int can = 1, native = 1;
      if (a != b) {
        cudaDeviceCanAccessPeer(&can, a, b);
        cudaDeviceGetP2PAttribute(&native, cudaDevP2PAttrNativeAtomicSupported, a, b);
      }
      row += a == b ? "  self" : can == 0 ? "    no" : native != 0 ? "  link" : "   pci";
      apart = apart || can == 0;
    }
    findings.fact(a == 0 ? "peer access" : "", "GPU {}:{}", a, row);
  }
  if (count > 1)
    findings.fact("",
                  "link: NVLink or alike (native atomics); pci: through the PCIe switch or host");
  if (apart)
    findings.fact("",
                  "no: out of reach (IOMMU, ACS, or two roots). Rows of such pairs are staged: "
                  "they pass through host memory, and high throughput has no pool");
  if (!Env::get().staged_pairs.empty())
    findings.fact("staged", "pairs {} of ranks, asked for by EXPERTWIRE_STAGED_PAIRS",
                  Env::get().staged_pairs);
}

/// The rate at which all GPUs store to all others at once.
void measure_links(Findings& findings, int count) {
  constexpr std::size_t kBytes = std::size_t{32} << 20;
  run_in_process(count, [&](std::shared_ptr<Bootstrap> bootstrap) {
    CommunicatorOptions options;
    options.cuda_device = bootstrap->rank();
    options.arena_bytes = (kBytes + (std::size_t{2} << 20)) * static_cast<std::size_t>(count);
    auto communicator = Communicator::create(std::move(bootstrap), options);
    const int rank = communicator->rank();
    const SharedBlock block(communicator, kBytes * static_cast<std::size_t>(count));
    const DeviceGuard guard(rank);
    const auto stream = make_cuda_stream(rank);
    StoreAllParams params{};
    params.source = block.base(rank) + kBytes * static_cast<std::size_t>(rank);
    params.bytes_per_peer = kBytes;
    for (int i = 1; i < count; ++i)
      if (std::byte* base = block.base((rank + i) % count); base != nullptr)
        params.peers[params.count++] = base + kBytes * static_cast<std::size_t>(rank);
    if (communicator->staged_pair()) return;  // nothing that the others' rates would compare with
    cudaDeviceProp p{};
    check_cuda(cudaGetDeviceProperties(&p, rank), "cudaGetDeviceProperties");
    cudaEvent_t start = nullptr, end = nullptr;
    check_cuda(cudaEventCreate(&start), "cudaEventCreate");
    check_cuda(cudaEventCreate(&end), "cudaEventCreate");
    constexpr int kRounds = 20;
    communicator->barrier();
    for (int round = -3; round < kRounds; ++round) {
      if (round == 0) check_cuda(cudaEventRecord(start, stream.get()), "cudaEventRecord");
      check_cuda(launch_store_all(params, p.multiProcessorCount, stream.get()), "store_all");
    }
    check_cuda(cudaEventRecord(end, stream.get()), "cudaEventRecord");
    check_cuda(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, start, end), "cudaEventElapsedTime");
    cudaEventDestroy(start);
    cudaEventDestroy(end);
    std::vector<double> rates(static_cast<std::size_t>(count));
    rates[static_cast<std::size_t>(rank)] =
        static_cast<double>(kBytes) * params.count * kRounds / (static_cast<double>(ms) * 1e6);
    communicator->all_gather(rates.data(), sizeof(double));
    if (rank == 0)
      findings.fact("measured", "{:.0f} GB/s a GPU (slowest), all {} storing to all others at once",
                    *std::min_element(rates.begin(), rates.end()), count);
    communicator->barrier();
  });
}

}  // namespace

void examine_gpus(Findings& findings, bool measure) {
  findings.section("CUDA backend");
  int count = 0;
  if (!find_devices(findings, count)) return;
  for (int device = 0; device < count; ++device) examine_device(findings, device);
  examine_peers(findings, count);
  if (mps_runs())
    findings.fact("MPS", "runs: processes may share a GPU");
  else
    findings.fact("MPS", "does not run: a process a GPU, or ranks as threads of one process");
  if (!measure || count < 2 || count > StoreAllParams::kMostPeers) return;
  try {
    measure_links(findings, count);
  } catch (const std::exception& error) {
    findings.problem(error.what(), "see the message; nvidia-smi topo -m shows the links");
  }
}

}  // namespace expertwire::tools
