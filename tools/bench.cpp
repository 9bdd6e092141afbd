#include "bench.hpp"

#include <fmt/format.h>

#include <chrono>
#include <stdexcept>

#include "backend.hpp"
#include "base/env.hpp"
#include "bench_cuda.hpp"
#include "ep/front/object.hpp"
#include "ep/front/route.hpp"
#include "ep/protocol/row_format.hpp"
#include "launcher.hpp"
#include "limits.hpp"

namespace expertwire::tools {

double now_us() {
  return std::chrono::duration<double, std::micro>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void hold_up(double us) {
  for (const double end = now_us() + us; us > 0 && now_us() < end;) {
  }
}

void time_on_host(Communicator& communicator, const BenchOptions& options,
                  const std::function<void(int, double, Timings&)>& run, Measurement& result) {
  Timings unused;
  communicator.barrier();
  for (int i = 0; i < options.warmup + options.iterations; ++i)
    run(i, 0, i < options.warmup ? unused : result.timings);
  if (options.late_us <= 0) return;
  communicator.barrier();
  const double late = communicator.rank() == kLateRank ? options.late_us : 0;
  for (int i = 0; i < options.iterations; ++i) run(i, late, result.late);
}

Steps make_steps(const reference::Workload& workload, int rank) {
  constexpr std::size_t kRotate = std::size_t{64} << 20;
  const reference::WorkloadSpec& spec = workload.spec();
  const MoeShape& shape = spec.shape;
  const std::size_t bytes = static_cast<std::size_t>(shape.max_tokens) * shape.row_bytes();
  const auto count = static_cast<int>(std::clamp<std::size_t>(kRotate / bytes, 2, 32));
  Steps steps;
  for (int step = 0; step < count; ++step) {
    steps.inputs.push_back(workload.input(rank, step));
    const auto& input = steps.inputs.back();
    const ep::Route route = ep::make_route({input.topk_idx.data(), true}, input.tokens, shape.top_k,
                                           {spec.ranks, shape.experts});
    for (std::int32_t rows : route.rows_to_expert) steps.traffic.selections += rows;
    for (std::int32_t rows : route.rows_to_rank) steps.traffic.unique += rows;
    steps.traffic.wire -= route.rows_to_rank[static_cast<std::size_t>(rank)];
  }
  steps.traffic.wire += steps.traffic.unique;
  for (double* rows : {&steps.traffic.selections, &steps.traffic.unique, &steps.traffic.wire})
    *rows /= count;
  std::vector<std::int64_t> all;
  for (int r = 0; r < spec.ranks; ++r) {
    const auto ids = workload.topk_idx(r, 0);
    all.insert(all.end(), ids.begin(), ids.end());
  }
  steps.skew = reference::measure_skew(all, shape.experts, spec.ranks);
  return steps;
}

std::size_t BenchOptions::dispatch_row_bytes() const {
  const auto format = ep::RowFormat::of(fp8 ? DType::fp8_e4m3 : shape.dtype, shape.hidden);
  return format.data_bytes + format.scale_bytes();
}

Measurement start_measurement(const Communicator& communicator, const Steps& steps,
                              const BenchOptions& options) {
  Measurement result;
  result.traffic = steps.traffic;
  result.skew = steps.skew;
  result.threads = ep::team_size(communicator, options.threads);
  result.unique_bytes = static_cast<std::size_t>(steps.traffic.unique *
                                                 static_cast<double>(options.shape.row_bytes()));
  return result;
}

Measurement measure(const std::shared_ptr<Communicator>& communicator,
                    const BenchOptions& options) {
  if (communicator->cuda_device() >= 0)
    return options.high_throughput ? bench_cuda_high_throughput(communicator, options)
                                   : bench_cuda_low_latency(communicator, options);
  return options.high_throughput ? bench_high_throughput(communicator, options)
                                 : bench_low_latency(communicator, options);
}

reference::RoundTripOptions check_of(const BenchOptions& options) {
  using Payload = reference::RoundTripOptions::Payload;
  reference::RoundTripOptions check;
  check.weights = options.weights;
  if (options.fp8) check.payload = options.high_throughput ? Payload::fp8 : Payload::cast;
  if (!options.high_throughput) return check;
  check.output = options.output;
  check.layout = options.layout;
  check.alignment = options.alignment;
  check.in_place = options.output == HighThroughput::Output::pool;
  return check;
}

std::int64_t BenchOptions::most_rows(int of_ranks) const {
  const std::int64_t tokens = std::int64_t{of_ranks} * shape.max_tokens;
  return grouped() ? tokens * shape.top_k + std::int64_t{shape.experts / of_ranks} * (alignment - 1)
                   : tokens;
}

/// What the object of a bench is made with; a pool only if rows stay there.
HighThroughputOptions high_throughput_options(const BenchOptions& options) {
  HighThroughputOptions result{options.shape, options.lanes};
  result.threads = options.threads;
  if (options.output == HighThroughput::Output::pool)
    result.pool_rows = HighThroughputOptions::kEveryRow;
  return result;
}

std::size_t arena_bytes_for(const BenchOptions& options, int ranks) {
  // The object, and as much again as one operation moves, for the burst.
  const std::size_t burst = static_cast<std::size_t>(ranks) *
                            static_cast<std::size_t>(options.shape.max_tokens) *
                            options.shape.row_bytes();
  if (options.high_throughput)
    return HighThroughput::memory_bytes(high_throughput_options(options), ranks) + burst;
  return LowLatency::memory_bytes({options.shape, options.lanes}, ranks) + burst;
}

namespace {

/// Bytes of host memory that a bench takes of each rank, roughly: its inputs, and on the CPU
/// backend the object's and its outputs.
double memory_of(const BenchOptions& options, int ranks, bool cuda) {
  const std::size_t object =
      options.high_throughput
          ? HighThroughput::memory_bytes(high_throughput_options(options), ranks)
          : LowLatency::memory_bytes({options.shape, options.lanes}, ranks);
  const auto row = static_cast<double>(options.shape.row_bytes());
  const double tokens = options.shape.max_tokens;
  const double inputs = std::max(2 * 2 * tokens * row, 2.0 * 64e6);  // x and bias of all steps
  const double rows = options.high_throughput ? tokens * ranks : tokens * options.shape.experts;
  return inputs + (cuda ? 0 : static_cast<double>(object) + 2 * rows * row);
}

/// Throws if the shape cannot be, or if the ranks of this machine have no room for it.
void check_room(const BenchOptions& options, int ranks, int here) {
  const bool cuda = wants_cuda(options.device, here);
  const double needed = memory_of(options, ranks, cuda) * here, free = free_memory_bytes();
  if (needed > free)
    throw std::invalid_argument(fmt::format(
        "this bench takes about {:.1f} GB on {} ranks of this machine, which has {:.1f} GB "
        "free; give fewer --tokens, --experts or --ranks",
        needed / 1e9, here, free / 1e9));
}

}  // namespace

int run_bench(const BenchOptions& options, const std::vector<std::string>& command) {
  reference::RoutingPattern::parse(options.routing);  // bad words are found before ranks start
  const bool mpi = options.peer == "mpi", sweeps = options.tune || !options.sweep.empty();
  if (options.fp8 && !options.peer.empty())
    throw std::invalid_argument("--peer compares rows of --dtype; leave --fp8 out");
  if (mpi && !options.high_throughput)
    throw std::invalid_argument("--peer mpi compares high throughput; use `bench ht`");
  if (sweeps && !options.peer.empty())
    throw std::invalid_argument("--peer compares with one number of SMs; leave --tune out");
  const Env& env = Env::get();
  if (options.tune && !options.high_throughput && (options.sms > 0 || !options.sweep.empty()))
    throw std::invalid_argument("--tune of ll tries numbers of SMs itself; leave --sms out");
  if (options.tune && (env.sender_warps > 0 || env.ring_bytes > 0))
    throw std::invalid_argument(
        "--tune holds the formula against a sweep, but EXPERTWIRE_SENDER_WARPS or "
        "EXPERTWIRE_RING_BYTES replaces it; unset them");
  if (options.late_us > 0 && sweeps)
    throw std::invalid_argument("--late is for one number of SMs; leave --tune and the others out");
  const bool launched = env.rank.has_value();
  if (!launched) {
    const int ranks = options.ranks > 0               ? options.ranks
                      : wants_cuda(options.device, 1) ? cuda_device_count()
                                                      : 2;
    check_room(options, ranks, ranks);
    if (mpi) {
      std::vector<std::string> mpirun{
          "mpirun", "--oversubscribe",       "--allow-run-as-root", "--bind-to", "none",
          "-n",     fmt::format("{}", ranks)};
      mpirun.insert(mpirun.end(), command.begin(), command.end());
      return become(mpirun);
    }
    return launch({ranks, command});
  }
  const bool cuda = wants_cuda(options.device, local_size());
  if (cuda && mpi)
    throw std::invalid_argument("--peer mpi compares on the CPU; give --device cpu with it");
  if (!cuda && (options.peer == "nccl" || sweeps))
    throw std::invalid_argument("--peer nccl, --tune and several --sms are for GPUs");
  check_room(options, *env.size, local_size());
  const std::size_t arena = cuda ? arena_bytes_for(options, *Env::get().size) : 0;
  auto communicator =
      Communicator::from_environment(communicator_options(cuda, local_rank(), arena));
  if (options.ranks > 0 && options.ranks != communicator->size())
    throw std::invalid_argument(fmt::format("--ranks {}, but the launcher started {}",
                                            options.ranks, communicator->size()));
  if (options.late_us > 0 && communicator->size() < 2)
    throw std::invalid_argument("--late needs two ranks or more; one of them is late");
  if (sweeps)
    return report_sweep(*communicator, options, sweep(communicator, options)) == 0 ? 0 : 1;
  const Measurement measurement = measure(communicator, options);
  return report(*communicator, options, measurement) == 0 ? 0 : 1;
}

}  // namespace expertwire::tools
