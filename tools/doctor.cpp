#include "doctor.hpp"

#include <sys/resource.h>
#include <sys/statvfs.h>

#include <algorithm>

#include "base/env.hpp"
#include "doctor_findings.hpp"
#include "expertwire/communicator.hpp"
#include "expertwire/high_throughput.hpp"
#include "expertwire/low_latency.hpp"
#include "expertwire/topology.hpp"
#include "expertwire/version.hpp"
#include "limits.hpp"

namespace expertwire::tools {

namespace {

constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;

void examine_host(Findings& findings) {
  findings.section("Host");
  const RankPlace place = local_place();
  findings.fact("cores", "{} that this process may use", place.cores);
  if (place.numa_node >= 0)
    findings.fact("NUMA", "bound to node {}", place.numa_node);
  else
    findings.fact("NUMA", "not bound to one node, or not known");
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  findings.fact("open files", "{}", limit.rlim_cur);
  constexpr rlim_t kFewFiles = 256;  // a rank has one socket and, for a moment, two more a peer
  if (limit.rlim_cur < kFewFiles)
    findings.problem("the limit of open files is low for many ranks", "ulimit -n 65536");
  ::getrlimit(RLIMIT_AS, &limit);
  if (limit.rlim_cur != RLIM_INFINITY)
    findings.problem(fmt::format("address space is limited to {:.1f} GiB; a CPU arena reserves 64",
                                 static_cast<double>(limit.rlim_cur) / kGiB),
                     "ulimit -v unlimited, or a smaller EXPERTWIRE_ARENA_BYTES");
  ::getrlimit(RLIMIT_MEMLOCK, &limit);
  findings.fact(
      "locked memory", "{}",
      limit.rlim_cur == RLIM_INFINITY
          ? std::string("unlimited")
          : fmt::format("{} KiB (enough: nothing is locked here)", limit.rlim_cur / 1024));
}

/// A communicator of two thread ranks says more than any list of facts.
void try_cpu_backend(Findings& findings, bool measure) {
  findings.section("CPU backend");
  try {
    run_in_process(2, [&](std::shared_ptr<Bootstrap> bootstrap) {
      auto communicator = Communicator::create(std::move(bootstrap));
      const double us = measure ? measure_memcpy(*communicator, std::size_t{8} << 20, 1) : 0;
      if (communicator->rank() != 0) return;
      findings.fact("works", "{}", communicator->banner());
      if (measure)
        findings.fact("memory", "{:.1f} GB/s a thread, two at once (memcpy of 8 MiB)",
                      8 * 1.048576 * 1e3 / us);
    });
  } catch (const std::exception& error) {
    findings.problem(error.what(), "see the message; docs/environment.md has the variables");
  }
}

void examine_job(Findings& findings) {
  findings.section("Job");
  const Env& env = Env::get();
  if (env.rank)
    findings.fact("launcher", "{}: rank {} of {}", env.launcher, *env.rank, *env.size);
  else
    findings.fact("launcher", "none: a program started now is a job of one rank");
  findings.fact("deadline", "{} ms (EXPERTWIRE_TIMEOUT_MS)", env.timeout_ms);
}

/// What an object of a usual shape takes of every rank's memory.
void examine_memory(Findings& findings) {
  const int ranks = std::max(2, Env::get().size.value_or(2));
  const MoeShape shape{7168, 256 / ranks * ranks, 8, 4096, DType::bf16};
  if (ranks > 256) return;
  const auto mb = [](std::size_t bytes) { return static_cast<double>(bytes) / 1e6; };
  HighThroughputOptions owned{shape}, pool{shape};
  owned.shape.max_tokens = 0;
  pool.pool_rows = HighThroughputOptions::kEveryRow;
  LowLatencyOptions low{shape};
  low.shape.max_tokens = 128;
  findings.section(fmt::format("Memory of an object, {} ranks, H 7168, K 8, bf16", ranks).c_str());
  findings.fact("high throughput", "{:.1f} MB, however many tokens: rows pass through rings",
                mb(HighThroughput::memory_bytes(owned, ranks)));
  findings.fact("with a pool", "{:.1f} MB for 4096 tokens a rank",
                mb(HighThroughput::memory_bytes(pool, ranks)));
  findings.fact("low latency", "{:.1f} MB for 128 tokens a rank",
                mb(LowLatency::memory_bytes(low, ranks)));
}

}  // namespace

int run_doctor(bool measure) {
  fmt::print("expertwire {}\n", kVersion);
  Findings findings;
  examine_host(findings);
  examine_job(findings);
  examine_memory(findings);
  try_cpu_backend(findings, measure);
  examine_network(findings, measure);
  examine_gpus(findings, measure);
  fmt::print("\n{}\n", findings.problems() == 0
                           ? "Nothing is wrong."
                           : fmt::format("{} thing{} wrong; see above.", findings.problems(),
                                         findings.problems() == 1 ? " is" : "s are"));
  return findings.problems() == 0 ? 0 : 1;
}

}  // namespace expertwire::tools
