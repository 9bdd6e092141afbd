#include "mpi_peer.hpp"

#include <dlfcn.h>
#include <unistd.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "ep/cpu/stream_rule.hpp"
#include "ep/cpu/team.hpp"
#include "ep/cpu/vector_ops.hpp"
#include "ep/front/route.hpp"
#include "mpi_peer_module.hpp"

namespace expertwire::tools {

namespace {

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

const ExpertwireMpiPeer& load_mpi() {
  std::string path(4096, '\0');
  const ssize_t length = ::readlink("/proc/self/exe", path.data(), path.size());
  path.resize(length > 0 ? index(length) : 0);
  path = path.substr(0, path.rfind('/') + 1) + "libexpertwire_mpi_peer.so";
  void* library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr)
    throw std::runtime_error(std::string("--peer mpi needs MPI: install libopenmpi-dev and "
                                         "openmpi-bin and build again (") +
                             ::dlerror() + ")");
  auto entry =
      reinterpret_cast<const ExpertwireMpiPeer* (*)()>(::dlsym(library, "expertwire_mpi_peer"));
  return *entry();
}

void require(int result, const char* call) {
  if (result != 0) throw std::runtime_error(std::string(call) + " failed");
}

/// Buffers and the routing of one step.
class Exchange {
 public:
  Exchange(const ExpertwireMpiPeer& mpi, const BenchOptions& options, int ranks, int threads)
      : mpi_(mpi),
        options_(options),
        ranks_(ranks),
        team_(threads),
        rows_to_(index(ranks)),
        rows_from_(index(ranks)),
        send_bytes_(index(ranks)),
        receive_bytes_(index(ranks)),
        send_at_(index(ranks)),
        receive_at_(index(ranks)) {
    const std::size_t most = index(ranks) * index(options.shape.max_tokens) * row_bytes();
    packed_.resize(most);
    arrived_.resize(most);
    out_.resize(most);
  }

  void dispatch(const reference::RankInput& input) {
    route_ = ep::make_route({input.topk_idx.data(), true}, input.tokens, options_.shape.top_k,
                            {ranks_, options_.shape.experts});
    rows_to_.assign(route_.rows_to_rank.begin(), route_.rows_to_rank.end());
    require(mpi_.alltoall_int(rows_to_.data(), rows_from_.data()), "MPI_Alltoall");
    place(rows_to_, send_bytes_, send_at_);
    place(rows_from_, receive_bytes_, receive_at_);
    for_each_row([&](int token, const ep::Destination& to) {
      copy(packed(to), input.x.data() + index(token) * row_bytes());
    });
    require(mpi_.alltoallv(packed_.data(), send_bytes_.data(), send_at_.data(), arrived_.data(),
                           receive_bytes_.data(), receive_at_.data()),
            "MPI_Alltoallv");
    copy_received(out_, arrived_);  // unpack to the caller's memory
  }

  void combine() {
    copy_received(arrived_, out_);  // pack from the caller's memory
    require(mpi_.alltoallv(arrived_.data(), receive_bytes_.data(), receive_at_.data(),
                           packed_.data(), send_bytes_.data(), send_at_.data()),
            "MPI_Alltoallv");
    team_.run([&](int worker) {
      const auto tokens = ep::cpu::part_of(route_.tokens, worker, team_.size());
      for (auto t = static_cast<int>(tokens.begin); t < tokens.end; ++t) {
        const ep::Destination* list = route_.destinations_of(t);
        const void* rows[32];
        ep::cpu::SumRequest sum;
        for (; sum.count < route_.width() && list[sum.count].rank >= 0; ++sum.count)
          rows[sum.count] = packed(list[sum.count]);
        sum.dtype = options_.shape.dtype;
        sum.elements = index(options_.shape.hidden);
        sum.rows = rows;
        sum.out = out_.data() + index(t) * row_bytes();
        sum.stream = stream();
        ep::cpu::vector_ops().sum(sum);
      }
    });
  }

 private:
  std::size_t row_bytes() const { return options_.shape.row_bytes(); }
  bool stream() const { return ep::cpu::passes_caches(index(route_.tokens) * row_bytes()); }
  std::byte* packed(const ep::Destination& to) {
    return packed_.data() + index(send_at_[index(to.rank)]) + index(to.row) * row_bytes();
  }
  void copy(std::byte* to, const std::byte* from) const {
    void* target = to;
    ep::cpu::vector_ops().copy(&target, 1, from, row_bytes(), stream());
  }
  /// Copies all rows that came; on return other processes may read them.
  void copy_received(std::vector<std::byte>& to, const std::vector<std::byte>& from) {
    const std::int64_t bytes = receive_at_.back() + receive_bytes_.back();
    team_.run([&](int worker) {
      const auto part = ep::cpu::part_of(bytes / 16, worker, team_.size());
      void* target = to.data() + part.begin * 16;
      ep::cpu::vector_ops().copy(&target, 1, from.data() + part.begin * 16,
                                 index(part.end - part.begin) * 16, stream());
      ep::cpu::vector_ops().store_fence();
    });
  }
  void place(const std::vector<int>& rows, std::vector<int>& bytes, std::vector<int>& at) const {
    int end = 0;
    for (std::size_t r = 0; r < rows.size(); ++r) {
      at[r] = end;
      bytes[r] = rows[r] * static_cast<int>(row_bytes());
      end += bytes[r];
    }
  }
  template <class Visit>
  void for_each_row(Visit visit) {
    team_.run([&](int worker) {
      const auto tokens = ep::cpu::part_of(route_.tokens, worker, team_.size());
      for (auto t = static_cast<int>(tokens.begin); t < tokens.end; ++t) {
        const ep::Destination* list = route_.destinations_of(t);
        for (int i = 0; i < route_.width() && list[i].rank >= 0; ++i) visit(t, list[i]);
      }
      ep::cpu::vector_ops().store_fence();
    });
  }

  const ExpertwireMpiPeer& mpi_;
  const BenchOptions& options_;
  int ranks_;
  ep::cpu::Team team_;
  ep::Route route_;
  std::vector<int> rows_to_, rows_from_, send_bytes_, receive_bytes_, send_at_, receive_at_;
  std::vector<std::byte> packed_, arrived_, out_;
};

}  // namespace

Timings bench_mpi(const Communicator& communicator, const Steps& steps, const BenchOptions& options,
                  int threads) {
  const ExpertwireMpiPeer& mpi = load_mpi();
  int rank = 0, size = 0;
  require(mpi.start(&rank, &size), "MPI_Init");
  if (rank != communicator.rank() || size != communicator.size())
    throw std::runtime_error("--peer mpi needs ranks that mpirun started");
  Exchange exchange(mpi, options, size, threads);
  Timings timings;
  for (int i = 0; i < options.warmup + options.iterations; ++i) {
    const auto& input = steps.inputs[static_cast<std::size_t>(i) % steps.inputs.size()];
    const double start = now_us();
    exchange.dispatch(input);
    const double middle = now_us();
    exchange.combine();
    const double end = now_us();
    if (i < options.warmup) continue;
    timings.dispatch.push_back(middle - start);
    timings.combine.push_back(end - middle);
  }
  require(mpi.finish(), "MPI_Finalize");
  return timings;
}

}  // namespace expertwire::tools
