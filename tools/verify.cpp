#include "verify.hpp"

#include <fmt/format.h>

#include <array>
#include <map>
#include <mutex>
#include <stdexcept>

#include "backend.hpp"
#include "base/env.hpp"
#include "bench.hpp"
#include "expertwire/high_throughput.hpp"
#include "expertwire/low_latency.hpp"
#include "launcher.hpp"
#include "models.hpp"
#include "progress.hpp"
#include "reference/round_trip.hpp"

namespace expertwire::tools {

namespace {

using reference::Random;
using reference::Report;
using reference::RoundTripOptions;
using reference::Workload;
using reference::WorkloadSpec;

constexpr std::size_t kArena = std::size_t{1} << 30;  // of a rank, for any case that is drawn

/// One configuration; everything follows from its number.
struct Case {
  std::uint64_t number = 0;
  bool high_throughput = false;
  WorkloadSpec spec;
  std::vector<MoeShape> shapes;  ///< that calls of one object have in turn; the first is the spec's
  int lanes = 1;
  int steps = 1;
  bool pool = false;  ///< high throughput
  int ring_frames = 0;
  std::string staged = "none";  ///< pairs of thread ranks on CUDA

  std::string describe() const {
    const MoeShape& s = spec.shape;
    return fmt::format(
        "{} R {} H {} E {} K {} M {} {} and {} other shapes, routing {} lanes {} staged {}{}",
        high_throughput ? "ht" : "ll", spec.ranks, s.hidden, s.experts, s.top_k, s.max_tokens,
        to_string(s.dtype), shapes.size() - 1, spec.routing.text(), lanes, staged,
        high_throughput
            ? fmt::format(", {}, ring frames {}", pool ? "with a pool" : "no pool", ring_frames)
            : "");
  }
  /// The least that all of them fit into.
  MoeShape most() const {
    MoeShape all{0, 0, 0, 0, DType::bf16};
    std::size_t row_bytes = 0;
    for (const MoeShape& s : shapes) {
      row_bytes = std::max(row_bytes, s.row_bytes());
      all.experts = std::max(all.experts, s.experts);
      all.top_k = std::max(all.top_k, s.top_k);
      all.max_tokens = std::max(all.max_tokens, s.max_tokens);
    }
    all.hidden = static_cast<int>(row_bytes / size_of(all.dtype));
    return all;
  }
};

constexpr std::array kPatterns = {"uniform",     "balanced",    "lognormal:1.0", "powerlaw:1.01",
                                  "zipf:0.8",    "hotrank:0.7", "grouped:4,2",   "masked:0.3",
                                  "hotrank:1.0", "masked:1.0"};

MoeShape draw_shape(Random& random, int ranks) {
  MoeShape shape;
  shape.dtype = random.chance(0.6) ? DType::bf16 : random.chance(0.5) ? DType::fp16 : DType::fp32;
  shape.hidden =
      random.chance(0.3)
          ? models()[static_cast<std::size_t>(random.below(static_cast<int>(models().size())))]
                .hidden
          : 8 * (1 + random.below(200));
  shape.experts = ranks * (1 + random.below(40));
  shape.top_k = 1 + random.below(random.chance(0.2) ? 32 : 10);
  shape.max_tokens = 1 + random.below(shape.hidden > 2048 ? 24 : 150);
  return shape;
}

/// All pairs, or some.
std::string draw_staged(Random& random, int ranks) {
  if (random.chance(0.5)) return "all";
  std::string pairs;
  for (int a = 0; a < ranks; ++a)
    for (int b = a + 1; b < ranks; ++b)
      if (random.chance(0.4)) pairs += fmt::format("{}{}-{}", pairs.empty() ? "" : ",", a, b);
  return pairs.empty() ? "none" : pairs;
}

Case draw_case(std::uint64_t number, int ranks) {
  Random random{number, 4242};
  Case c;
  c.number = number;
  c.high_throughput = random.chance(0.5);
  c.spec.ranks = ranks > 0 ? ranks : 1 + random.below(8);
  c.spec.seed = number;
  c.spec.ragged = random.chance(0.8);
  c.spec.repeats = random.chance(0.2) ? 0.3 : 0;
  c.spec.routing = reference::RoutingPattern::parse(
      kPatterns[static_cast<std::size_t>(random.below(kPatterns.size()))]);
  const int others = random.chance(0.5) ? 1 + random.below(2) : 0;
  for (int i = 0; i <= others; ++i) c.shapes.push_back(draw_shape(random, c.spec.ranks));
  c.spec.shape = c.shapes[0];
  c.lanes = 1 + random.below(3);
  c.steps = 2 + random.below(4);
  c.pool = random.chance(0.6);
  if (random.chance(0.5)) c.ring_frames = 2 << random.below(5);
  if (random.chance(0.4)) c.staged = draw_staged(random, c.spec.ranks);
  return c;
}

/// What ranks may do as they like.
void draw_own_options(const Case& c, int step, int rank, RoundTripOptions* options) {
  Random random{c.number, 98, static_cast<std::uint64_t>(step), static_cast<std::uint64_t>(rank)};
  options->in_place = random.chance(0.5);
  options->preallocated = random.chance(0.5);
}

/// Threads and SMs of a rank: all, or few, but `fewest`.
std::pair<int, int> draw_budget(const Case& c, int rank, int fewest) {
  Random random{c.number, 97, static_cast<std::uint64_t>(rank)};
  const int threads = 1 + random.below(3);
  return {threads, random.chance(0.5) ? 0 : fewest + random.below(16)};
}

RoundTripOptions draw_options(const Case& c, const MoeShape& shape, int step, int rank) {
  using Weights = RoundTripOptions::Weights;
  Random random{c.number, 99, static_cast<std::uint64_t>(step)};
  RoundTripOptions options;
  const int weights = random.below(3);
  options.weights = weights == 0 ? Weights::none : Weights::dispatch;
  if (weights == 2 && !c.high_throughput) options.weights = Weights::combine;
  options.bias = random.chance(0.5);
  options.wide_ids = random.chance(0.5);
  options.split = random.chance(0.3);
  options.capacity = random.chance(0.4) ? 0.2 + 0.8 * random.uniform() : 0;
  options.weights_home = random.chance(0.5);
  options.cached = random.chance(0.3);
  if (shape.hidden % 16 == 0 && random.chance(0.4))
    options.payload = c.high_throughput || random.chance(0.5) ? RoundTripOptions::Payload::fp8
                                                              : RoundTripOptions::Payload::cast;
  if (c.pool && random.chance(0.5)) options.output = HighThroughput::Output::pool;
  if (options.output == HighThroughput::Output::owned && random.chance(0.4)) {
    constexpr std::array kAlignments = {1, 2, 5, 16, 64, 128, 512};
    options.layout = HighThroughput::Layout::expert_major;
    options.alignment = kAlignments[static_cast<std::size_t>(random.below(kAlignments.size()))];
  }
  draw_own_options(c, step, rank, &options);
  return options;
}

template <class Object, class Options>
Report run_steps(const std::shared_ptr<Communicator>& communicator, const Case& c,
                 const Options& object_options) {
  std::vector<Workload> workloads;
  for (const MoeShape& shape : c.shapes) {
    WorkloadSpec spec = c.spec;
    spec.shape = shape;
    workloads.emplace_back(spec);
  }
  auto object = Object::create(communicator, object_options);
  Report report;
  for (int step = 0; step < c.steps; ++step) {
    const std::size_t turn = static_cast<std::size_t>(step) % workloads.size();
    report += round_trip(*object, *communicator, workloads[turn], step,
                         draw_options(c, c.shapes[turn], step, communicator->rank()));
  }
  return report;
}

HighThroughputOptions high_throughput_options(const Case& c, int threads, int sms) {
  HighThroughputOptions options{c.most(), c.lanes, 0, threads, sms};
  if (c.pool) options.pool_rows = HighThroughputOptions::kEveryRow;
  options.ring_frames = c.ring_frames;
  return options;
}

/// One rank's part of one case.
Report run_case(const std::shared_ptr<Communicator>& communicator, Case c) {
  const MoeShape shape = c.most();
  const bool staged = communicator->staged_pair().has_value();
  c.pool = c.pool && !staged;
  const auto [threads, sms] = draw_budget(c, communicator->rank(), staged ? 2 : 1);
  if (c.high_throughput)
    return run_steps<HighThroughput>(communicator, c, high_throughput_options(c, threads, sms));
  return run_steps<LowLatency>(communicator, c, LowLatencyOptions{shape, c.lanes, threads, sms});
}

/// Counts, shows progress and says at the end what was seen.
class Tally {
 public:
  explicit Tally(const VerifyOptions& options) : options_(options), start_(now_us()) {}

  bool more() const {
    if (options_.only) return cases_ == 0;
    if (options_.cases > 0) return cases_ < options_.cases;
    return elapsed() < options_.seconds;
  }
  std::uint64_t next_number() const {
    return options_.only ? *options_.only
                         : options_.seed * 1'000'000 + static_cast<std::uint64_t>(cases_);
  }
  void add(const Case& c, const Report& report) {
    ++cases_;
    ++by_ranks_[c.spec.ranks];
    checked_ += report.checked;
    wrong_ += report.wrong;
    if (report.wrong > 0)
      fmt::print(
          "WRONG {} of {} values: {}\n  first: {}\n  repeat: expertwire verify --case {}{}\n",
          report.wrong, report.checked, c.describe(), report.first_wrong, c.number,
          options_.ranks > 0 ? fmt::format(" --ranks {}{}", options_.ranks,
                                           options_.processes ? " --processes" : "")
                             : "");
    const double share = options_.cases > 0
                             ? static_cast<double>(cases_) / static_cast<double>(options_.cases)
                             : elapsed() / options_.seconds;
    progress_.show(share, fmt::format("{} cases, {:.1f} M values, {} wrong", cases_,
                                      static_cast<double>(checked_) / 1e6, wrong_));
  }
  int finish() const {
    std::string ranks;
    for (const auto& [size, count] : by_ranks_)
      ranks += fmt::format("{}R={}: {}", ranks.empty() ? "" : ", ", size, count);
    fmt::print("verified {} cases ({}), {} values in {:.1f} s: {} wrong\n", cases_, ranks, checked_,
               elapsed(), wrong_);
    return wrong_ == 0 && cases_ > 0 ? 0 : 1;
  }
  double elapsed() const { return (now_us() - start_) / 1e6; }

 private:
  const VerifyOptions& options_;
  double start_;
  std::int64_t cases_ = 0, checked_ = 0, wrong_ = 0;
  std::map<int, std::int64_t> by_ranks_;
  mutable Progress progress_{"verify"};
};

int verify_with_threads(const VerifyOptions& options) {
  Tally tally(options);
  while (tally.more()) {
    const Case c = draw_case(tally.next_number(), options.ranks);
    std::mutex mutex;
    Report total;
    try {
      run_in_process(c.spec.ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
        auto memory =
            communicator_options(wants_cuda(options.device, 1), bootstrap->rank(), kArena);
        if (Env::get().staged_pairs.empty()) memory.staged_pairs = c.staged;
        const int rank = bootstrap->rank();
        try {
          const Report mine = run_case(Communicator::create(std::move(bootstrap), memory), c);
          std::lock_guard lock(mutex);
          total += mine;
        } catch (const std::exception& error) {
          fmt::print("rank {}: {}\n", rank, error.what());
          throw;
        }
      });
    } catch (const std::exception&) {
      fmt::print("FAILED: {}\n  repeat: expertwire verify --case {}\n", c.describe(), c.number);
      throw;
    }
    tally.add(c, total);
  }
  return tally.finish();
}

int verify_as_rank(const VerifyOptions& options) {
  const bool cuda = wants_cuda(options.device, local_size());
  auto communicator =
      Communicator::from_environment(communicator_options(cuda, local_rank(), kArena));
  const auto ranks = static_cast<std::size_t>(communicator->size());
  Tally tally(options);
  for (;;) {
    struct Turn {
      std::int64_t more;
      std::uint64_t number;
    };
    std::vector<Turn> turns(ranks);  // rank 0 decides
    turns[static_cast<std::size_t>(communicator->rank())] = {tally.more() ? 1 : 0,
                                                             tally.next_number()};
    communicator->all_gather(turns.data(), sizeof(Turn));
    if (turns[0].more == 0) break;
    const Case c = draw_case(turns[0].number, communicator->size());
    const Report mine = run_case(communicator, c);
    struct Sum {
      std::int64_t checked, wrong;
    };
    std::vector<Sum> sums(ranks);
    sums[static_cast<std::size_t>(communicator->rank())] = {mine.checked, mine.wrong};
    communicator->all_gather(sums.data(), sizeof(Sum));
    Report total;
    for (const Sum& sum : sums) total += {sum.checked, sum.wrong, "see the other ranks"};
    if (mine.wrong > 0) total.first_wrong = mine.first_wrong;
    if (communicator->rank() == 0 || mine.wrong > 0) tally.add(c, total);
  }
  return communicator->rank() == 0 ? tally.finish() : 0;
}

}  // namespace

int run_verify(const VerifyOptions& options, const std::vector<std::string>& command) {
  if (Env::get().rank) return verify_as_rank(options);
  if (!options.processes) return verify_with_threads(options);
  const int processes = wants_cuda(options.device, 1) ? cuda_device_count() : 4;
  return launch({options.ranks > 0 ? options.ranks : processes, command});
}

}  // namespace expertwire::tools
