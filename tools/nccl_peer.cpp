#include "nccl_peer.hpp"

#include <dlfcn.h>
#include <fmt/format.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "base/cuda_event.hpp"
#include "base/device_tensors.hpp"
#include "ep/front/route.hpp"

namespace expertwire::tools {

namespace {

// What is used of NCCL's interface, which is loaded and not linked.
struct UniqueId {
  char bytes[128];
};
using Comm = struct NcclComm*;
constexpr int kUint8 = 1, kFloat16 = 6, kFloat32 = 7, kBfloat16 = 9, kSum = 0;

class Nccl {
 public:
  Nccl() : library_(::dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL)) {
    if (library_ == nullptr)
      throw std::runtime_error(std::string("--peer nccl needs libnccl.so.2: install it, or put its "
                                           "directory into LD_LIBRARY_PATH (") +
                               ::dlerror() + ")");
    find("ncclGetErrorString", error_string);
    find("ncclGetVersion", get_version);
    find("ncclGetUniqueId", get_unique_id);
    find("ncclCommInitRank", comm_init_rank);
    find("ncclCommDestroy", comm_destroy);
    find("ncclGroupStart", group_start);
    find("ncclGroupEnd", group_end);
    find("ncclSend", send);
    find("ncclRecv", receive);
    find("ncclAllGather", all_gather);
    find("ncclReduceScatter", reduce_scatter);
  }
  void require(int result, const char* call) const {
    if (result != 0)
      throw std::runtime_error(std::string(call) + " failed: " + error_string(result));
  }

  /// E.g. 2.28.9.
  std::string version() const {
    int number = 0;
    require(get_version(&number), "ncclGetVersion");
    return fmt::format("{}.{}.{}", number / 10000, number / 100 % 100, number % 100);
  }

  const char* (*error_string)(int);
  int (*get_version)(int*);
  int (*get_unique_id)(UniqueId*);
  int (*comm_init_rank)(Comm*, int, UniqueId, int);
  int (*comm_destroy)(Comm);
  int (*group_start)();
  int (*group_end)();
  int (*send)(const void*, std::size_t, int, int, Comm, cudaStream_t);
  int (*receive)(void*, std::size_t, int, int, Comm, cudaStream_t);
  int (*all_gather)(const void*, void*, std::size_t, int, Comm, cudaStream_t);
  int (*reduce_scatter)(const void*, void*, std::size_t, int, int, Comm, cudaStream_t);

 private:
  template <class Function>
  void find(const char* name, Function& function) {
    function = reinterpret_cast<Function>(::dlsym(library_, name));
    if (function == nullptr) throw std::runtime_error(std::string("libnccl.so.2 has no ") + name);
  }

  void* library_;  // stays loaded
};

std::size_t index(int i) { return static_cast<std::size_t>(i); }

/// Rows that go from each rank to each other in one step: [from][to].
std::vector<std::vector<int>> rows_between(Communicator& communicator,
                                           const reference::RankInput& input,
                                           const MoeShape& shape) {
  const int ranks = communicator.size();
  const ep::Route route = ep::make_route({input.topk_idx.data(), true}, input.tokens, shape.top_k,
                                         {ranks, shape.experts});
  std::vector<int> all(index(ranks) * index(ranks));
  std::copy(route.rows_to_rank.begin(), route.rows_to_rank.end(),
            all.begin() + communicator.rank() * ranks);
  communicator.all_gather(all.data(), index(ranks) * sizeof(int));
  std::vector<std::vector<int>> rows;
  for (int from = 0; from < ranks; ++from)
    rows.emplace_back(all.begin() + from * ranks, all.begin() + (from + 1) * ranks);
  return rows;
}

class Exchange {
 public:
  Exchange(Communicator& communicator, const Steps& steps, const BenchOptions& options,
           cudaStream_t stream)
      : communicator_(communicator),
        options_(options),
        stream_(stream),
        device_(communicator.cuda_device()) {
    const int ranks = communicator.size();
    std::vector<UniqueId> ids(index(ranks));
    if (communicator.rank() == 0) nccl_.require(nccl_.get_unique_id(&ids[0]), "ncclGetUniqueId");
    communicator.all_gather(ids.data(), sizeof(UniqueId));
    nccl_.require(nccl_.comm_init_rank(&comm_, ranks, ids[0], communicator.rank()),
                  "ncclCommInitRank");
    for (const auto& input : steps.inputs)
      rows_.push_back(rows_between(communicator, input, options.shape));
    const std::int64_t all = static_cast<std::int64_t>(ranks) * options.shape.max_tokens;
    for (TensorView* buffer : {&many_, &many_more_})
      *buffer = device_.make(options.shape.dtype, {all, options.shape.hidden});
    few_ = device_.make(options.shape.dtype, {options.shape.max_tokens, options.shape.hidden});
  }
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;
  ~Exchange() { nccl_.comm_destroy(comm_); }

  std::string version() const { return nccl_.version(); }

  /// Rows to every other rank, or (`back`) the other way round.
  void all_to_all(int step, bool back) {
    const auto& rows = rows_[index(step) % rows_.size()];
    const auto rank = index(communicator_.rank());
    const std::size_t row = options_.shape.row_bytes();
    const std::size_t region = row * index(options_.shape.max_tokens);
    nccl_.require(nccl_.group_start(), "ncclGroupStart");
    for (std::size_t peer = 0; peer < rows.size(); ++peer) {
      if (peer == rank) continue;
      const int there = rows[rank][peer], here = rows[peer][rank];
      nccl_.require(
          nccl_.send(many_.as<std::byte>() + peer * region, index(back ? here : there) * row,
                     kUint8, static_cast<int>(peer), comm_, stream_),
          "ncclSend");
      nccl_.require(nccl_.receive(many_more_.as<std::byte>() + peer * region,
                                  index(back ? there : here) * row, kUint8, static_cast<int>(peer),
                                  comm_, stream_),
                    "ncclRecv");
    }
    nccl_.require(nccl_.group_end(), "ncclGroupEnd");
  }
  void all_gather() {
    nccl_.require(nccl_.all_gather(few_.data(), many_.data(), elements(), type(), comm_, stream_),
                  "ncclAllGather");
  }
  void reduce_scatter() {
    nccl_.require(
        nccl_.reduce_scatter(many_.data(), few_.data(), elements(), type(), kSum, comm_, stream_),
        "ncclReduceScatter");
  }

  /// Back to back, between events.
  template <class Dispatch, class Combine>
  Timings time(Dispatch dispatch, Combine combine) {
    const int total = options_.warmup + options_.iterations;
    std::vector<CudaEvent> events(2 * index(total) + 1);
    communicator_.barrier();
    events[0].record(stream_);
    for (int i = 0; i < total; ++i) {
      dispatch(i);
      events[2 * index(i) + 1].record(stream_);
      combine(i);
      events[2 * index(i) + 2].record(stream_);
    }
    check_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    Timings timings;
    for (std::size_t i = index(options_.warmup); i < index(total); ++i) {
      timings.dispatch.push_back(events[2 * i + 1].us_since(events[2 * i]));
      timings.combine.push_back(events[2 * i + 2].us_since(events[2 * i + 1]));
    }
    return timings;
  }

 private:
  std::size_t elements() const {
    return index(options_.shape.max_tokens) * index(options_.shape.hidden);
  }
  int type() const {
    const DType dtype = options_.shape.dtype;
    return dtype == DType::bf16 ? kBfloat16 : dtype == DType::fp16 ? kFloat16 : kFloat32;
  }
  Communicator& communicator_;
  const BenchOptions& options_;
  cudaStream_t stream_;
  Nccl nccl_;
  Comm comm_ = nullptr;
  DeviceTensors device_;
  std::vector<std::vector<std::vector<int>>> rows_;  // by step, from, to
  TensorView many_, many_more_, few_;                // [R * T, H], [T, H]
};

}  // namespace

void require_nccl() { Nccl(); }

std::vector<Peer> bench_nccl(Communicator& communicator, const Steps& steps,
                             const BenchOptions& options, cudaStream_t stream) {
  Exchange exchange(communicator, steps, options, stream);
  const std::string version = exchange.version();
  return {{"nccl a2a", version,
           exchange.time([&](int i) { exchange.all_to_all(i, false); },
                         [&](int i) { exchange.all_to_all(i, true); })},
          {"nccl ag/rs", version,
           exchange.time([&](int) { exchange.all_gather(); },
                         [&](int) { exchange.reduce_scatter(); })}};
}

}  // namespace expertwire::tools
