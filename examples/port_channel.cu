// Kernels of two ranks send each other a row through proxies: over NVLink, PCIe or a network, as it
// comes. Run it as ranks: expertwire launch -n 2 -- ./port_channel
#include <cstdio>
#include <vector>

#include "expertwire/expertwire.hpp"
#include "expertwire/port_channel_device.cuh"

using namespace expertwire;
constexpr std::uint64_t kRow = 4096, kSecond = 1'000'000'000;

__global__ void exchange(PortChannelDevice channel, PortChannelDevice::Place to,
                         PortChannelDevice::Place from, unsigned char* row, int rank, int* came) {
  for (std::uint64_t i = threadIdx.x; i < kRow; i += blockDim.x) row[from.offset + i] = rank + 1;
  __threadfence_system();  // the proxy reads the row
  __syncthreads();
  if (threadIdx.x != 0) return;
  channel.put_with_signal(to, from, kRow, kSecond);
  if (channel.wait(1, 5 * kSecond)) *came = row[to.offset];
}

int main() try {
  CommunicatorOptions options;
  auto bootstrap = bootstrap_from_environment();
  options.cuda_device = bootstrap->rank() % cuda_device_count();
  auto communicator = Communicator::create(bootstrap, options);
  const int rank = communicator->rank(), peer = 1 - rank;
  // What the peer writes lies in the first half, what is sent in the second.
  const Memory mine = communicator->allocate_memory(2 * kRow);
  std::vector<char> texts(2 * 1024);
  const std::string text = mine.serialize();
  text.copy(texts.data() + rank * 1024, text.size());
  communicator->all_gather(texts.data(), 1024);
  const Memory theirs = communicator->open_memory({texts.data() + peer * 1024, text.size()});
  auto channels = PortChannel::open_all(communicator);

  int* came = nullptr;
  cudaMallocManaged(&came, sizeof(int));
  exchange<<<1, 256>>>(channels[peer].device(), {theirs.id(), 0}, {mine.id(), kRow},
                       reinterpret_cast<unsigned char*>(mine.data()), rank, came);
  if (cudaDeviceSynchronize() != cudaSuccess) return std::puts("the kernel failed"), 1;
  channels[peer].flush(communicator->timeout());
  std::printf("rank %d: a row of %d came from rank %d\n", rank, *came, peer);
  communicator->barrier();
  return *came == peer + 1 ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
