#include "env.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdlib>

#include "check.hpp"

namespace expertwire::inline v0 {

namespace {

struct Variable {
  const char* name;
  const char* fallback;  ///< default, as shown to people
  const char* meaning;
};

constexpr std::array kVariables = {
    Variable{"EXPERTWIRE_LOG", "warn",
             "Lowest level that is logged: `trace`, `debug`, `info`, `warn`, `error` or `off`. "
             "At `info` rank 0 prints the one-line banner."},
    Variable{"EXPERTWIRE_LOG_SUBSYS", "all",
             "Subsystems to log, separated by commas: `boot`, `topo`, `mem`, `conn`, `ep`, "
             "`tool`; a leading `^` inverts the list."},
    Variable{"EXPERTWIRE_LOG_FILE", "stderr",
             "File to log to; `%h` becomes the host name and `%p` the process id."},
    Variable{"EXPERTWIRE_RANK", "from the launcher",
             "This process's rank. Without it torchrun's, Open MPI's and Slurm's variables are "
             "tried, in that order."},
    Variable{"EXPERTWIRE_SIZE", "from the launcher", "Number of ranks of the job."},
    Variable{"EXPERTWIRE_LOCAL_SIZE", "from the launcher, else the size",
             "Number of ranks on this host."},
    Variable{"EXPERTWIRE_JOB", "from the launcher",
             "A name that only the ranks of this job share; it names the rendezvous on one host."},
    Variable{"EXPERTWIRE_RENDEZVOUS", "a local socket",
             "`host:port` where rank 0 listens. Needed only when ranks run on several hosts."},
    Variable{"EXPERTWIRE_SECRET", "made by rank 0",
             "The job's secret, at least 32 hexadecimal digits. Ranks on several hosts need it "
             "or `EXPERTWIRE_SECRET_FILE`."},
    Variable{"EXPERTWIRE_SECRET_FILE", "none",
             "File that holds the secret; it must belong to this user with mode 0600."},
    Variable{"EXPERTWIRE_TIMEOUT_MS", "30000", "Deadline of every wait, in milliseconds."},
    Variable{"EXPERTWIRE_ARENA_BYTES", "CPU: 64 GiB; CUDA: 2 GiB, at most 1/16 of the device",
             "Size of a rank's arena, in bytes. On the CPU it is address space: memory is taken "
             "when it is touched. On CUDA it is taken when the communicator is made."},
    Variable{"EXPERTWIRE_CUDA_MEMORY", "auto",
             "How device memory is shared between processes: `posix_fd`, `fabric` or `ipc`; "
             "`auto` tries them in that order."},
    Variable{"EXPERTWIRE_CUDA_COPIES", "auto",
             "`vector` makes kernels move rows by 16-byte loads and stores also where the device "
             "has a bulk copy engine."},
    Variable{"EXPERTWIRE_STAGED_PAIRS", "none",
             "Pairs of ranks, on CUDA, that reach each other through host memory though their GPUs "
             "could do without: `all`, or pairs such as `0-1,2-3`. GPUs that cannot do without "
             "need no variable."},
    Variable{"EXPERTWIRE_RANKS_PER_NODE", "0 (what the hosts are)",
             "Cuts ranks into nodes of this many consecutive ranks, so that one machine can stand "
             "for several."},
    Variable{"EXPERTWIRE_THREADS", "0 (cores / local ranks, at most 8)",
             "Threads with which a rank of the CPU backend works."},
    Variable{"EXPERTWIRE_PROXIES", "0 (a rank's cores / 4, 1 to 4)",
             "Proxy threads of a rank, among which its peers are divided; 1 to 64. They start with "
             "the first port channel, or with the communicator if a peer is behind a network."},
    Variable{"EXPERTWIRE_UCX", "auto",
             "The network engine: `auto` loads `libucp.so.0`, a path loads that, `off` does "
             "without. UCX's own variables pass through."},
    Variable{
        "EXPERTWIRE_REMOTE_WRITES", "auto",
        "`auto` writes into peers' registered memory where UCX reports rc, dc or srd for them; "
        "`on` does so over any wire, for tests (a peer's death can then end its peers, too); "
        "`off` sends messages alone."},
    Variable{"EXPERTWIRE_NETWORK_PAIRS", "none",
             "Pairs of ranks that reach each other over the network though they are on one host: "
             "`all`, or pairs such as `0-1,2-3`. Ranks of several hosts need no variable."},
    Variable{"EXPERTWIRE_NIC_BYTES", "2097152",
             "Bytes that a rank's proxies have under way at a time, at most."},
    Variable{"EXPERTWIRE_PEER_TIMEOUT_MS", "5000",
             "A peer behind the network that has not been heard of for so long is taken for dead."},
    Variable{"EXPERTWIRE_SENDER_WARPS", "0 (by formula)",
             "High-throughput dispatch on CUDA: warps of a block, of 16, that send rows; 1 to 15."},
    Variable{"EXPERTWIRE_RING_BYTES", "0 (by formula)",
             "High-throughput dispatch on CUDA: what of a block's shared memory holds rows on "
             "their way, 16384 to 229376 bytes."},
    Variable{"EXPERTWIRE_LINK_GBPS", "0 (measured)",
             "Speed at which a GPU writes to a peer, in GB/s; the formula starts from it. Measured "
             "when a high-throughput object is made that has 8 MB of pool or more, once a "
             "communicator."},
    Variable{"EXPERTWIRE_FIRST_EPOCH", "0",
             "Epoch before the first operation (32 bits); tests start close to where it wraps."},
    Variable{"CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps",
             "Where the MPS daemon listens; expertwire looks whether it runs before processes may "
             "share a GPU."},
    Variable{"XDG_RUNTIME_DIR", "/tmp",
             "Directory of the file through which rank 0 hands its secret to the other ranks of "
             "one host, when the launcher gave none. The file is gone once all have joined."},
};

std::string text_of(const char* name, const char* fallback = "") {
  const char* value = std::getenv(name);
  return value != nullptr ? value : fallback;
}

std::optional<std::int64_t> integer_of(const char* name, std::int64_t lowest,
                                       std::int64_t highest) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0') return std::nullopt;
  char* end = nullptr;
  errno = 0;
  const long long number = std::strtoll(value, &end, 0);
  check_argument(*end == '\0' && errno == 0 && number >= lowest && number <= highest,
                 "the environment variable {}={} must be a whole number from {} to {}", name, value,
                 lowest, highest);
  return number;
}

/// The variables by which a launcher tells a process who it is.
struct Launcher {
  const char* name;
  const char* rank;
  const char* size;
  const char* local_size;
  const char* job;
};

constexpr std::array kLaunchers = {
    Launcher{"expertwire", "EXPERTWIRE_RANK", "EXPERTWIRE_SIZE", "EXPERTWIRE_LOCAL_SIZE",
             "EXPERTWIRE_JOB"},
    Launcher{"torchrun", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"},
    Launcher{"mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE",
             "PMIX_NAMESPACE"},
    Launcher{"srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_TASKS_PER_NODE", "SLURM_JOB_ID"},
};

constexpr int kMostRanks = 1 << 20;

void read_launcher(Env& env) {
  for (const Launcher& launcher : kLaunchers) {
    auto rank = integer_of(launcher.rank, 0, kMostRanks);
    auto size = integer_of(launcher.size, 1, kMostRanks);
    if (!rank || !size) continue;
    check_argument(*rank < *size, "the environment says {}={} and {}={}; a rank is below the size",
                   launcher.rank, *rank, launcher.size, *size);
    env.launcher = launcher.name;
    env.rank = static_cast<int>(*rank);
    env.size = static_cast<int>(*size);
    // Slurm writes "4(x2)" for two nodes of four: the leading number is what is wanted.
    const long local = std::atol(text_of(launcher.local_size).c_str());
    env.local_size = local > 0 ? static_cast<int>(local) : static_cast<int>(*size);
    env.job = text_of(launcher.job);
    if (env.launcher == "torchrun")
      env.job += "-" + text_of("MASTER_ADDR") + "-" + text_of("MASTER_PORT") + "-" +
                 text_of("TORCHELASTIC_RESTART_COUNT");
    if (env.launcher == "srun") env.job += "." + text_of("SLURM_STEP_ID");
    return;
  }
}

}  // namespace

Env Env::read() {
  Env env;
  env.log = text_of("EXPERTWIRE_LOG", "warn");
  env.log_subsystems = text_of("EXPERTWIRE_LOG_SUBSYS", "all");
  env.log_file = text_of("EXPERTWIRE_LOG_FILE");
  read_launcher(env);
  env.rendezvous = text_of("EXPERTWIRE_RENDEZVOUS");
  env.secret = text_of("EXPERTWIRE_SECRET");
  env.secret_file = text_of("EXPERTWIRE_SECRET_FILE");
  env.runtime_dir = text_of("XDG_RUNTIME_DIR", "/tmp");
  env.timeout_ms = integer_of("EXPERTWIRE_TIMEOUT_MS", 1, std::int64_t{1} << 40).value_or(30000);
  env.arena_bytes = integer_of("EXPERTWIRE_ARENA_BYTES", 4096, std::int64_t{1} << 46);
  env.cuda_memory = text_of("EXPERTWIRE_CUDA_MEMORY", "auto");
  check_argument(env.cuda_memory == "auto" || env.cuda_memory == "posix_fd" ||
                     env.cuda_memory == "fabric" || env.cuda_memory == "ipc",
                 "the environment variable EXPERTWIRE_CUDA_MEMORY={} must be auto, posix_fd, "
                 "fabric or ipc",
                 env.cuda_memory);
  env.cuda_copies = text_of("EXPERTWIRE_CUDA_COPIES", "auto");
  check_argument(env.cuda_copies == "auto" || env.cuda_copies == "vector",
                 "the environment variable EXPERTWIRE_CUDA_COPIES={} must be auto or vector",
                 env.cuda_copies);
  env.staged_pairs = text_of("EXPERTWIRE_STAGED_PAIRS");
  env.mps_pipe = text_of("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps");
  env.ranks_per_node =
      static_cast<int>(integer_of("EXPERTWIRE_RANKS_PER_NODE", 0, kMostRanks).value_or(0));
  env.threads = static_cast<int>(integer_of("EXPERTWIRE_THREADS", 0, 1024).value_or(0));
  env.proxies = static_cast<int>(integer_of("EXPERTWIRE_PROXIES", 0, 64).value_or(0));
  env.ucx = text_of("EXPERTWIRE_UCX", "auto");
  env.remote_writes = text_of("EXPERTWIRE_REMOTE_WRITES", "auto");
  check_argument(
      env.remote_writes == "auto" || env.remote_writes == "on" || env.remote_writes == "off",
      "the environment variable EXPERTWIRE_REMOTE_WRITES={} must be auto, on or off",
      env.remote_writes);
  env.network_pairs = text_of("EXPERTWIRE_NETWORK_PAIRS");
  env.nic_bytes = integer_of("EXPERTWIRE_NIC_BYTES", 65536, INT64_MAX).value_or(2 << 20);
  env.peer_timeout_ms =
      integer_of("EXPERTWIRE_PEER_TIMEOUT_MS", 10, std::int64_t{1} << 40).value_or(5000);
  env.sender_warps =
      static_cast<int>(integer_of("EXPERTWIRE_SENDER_WARPS", 0, INT32_MAX).value_or(0));
  env.ring_bytes = static_cast<int>(integer_of("EXPERTWIRE_RING_BYTES", 0, INT32_MAX).value_or(0));
  env.link_gbps = static_cast<double>(integer_of("EXPERTWIRE_LINK_GBPS", 0, 100'000).value_or(0));
  env.first_epoch =
      static_cast<std::uint32_t>(integer_of("EXPERTWIRE_FIRST_EPOCH", 0, 0xFFFFFFFFLL).value_or(0));
  return env;
}

void set_unless_set(const char* name, const char* value) { ::setenv(name, value, 0); }

const Env& Env::get() {
  static const Env env = read();
  return env;
}

std::string environment_page() {
  std::string page =
      "# Environment variables\n\n"
      "expertwire reads its environment once, at first use. It writes to it in one case: where UCX "
      "is\n"
      "loaded, some of UCX's variables that are unset get the values that suit it; none is "
      "changed.\n"
      "`expertwire env` prints this page; a test holds it against the code.\n\n"
      "| variable | default | meaning |\n| --- | --- | --- |\n";
  for (const Variable& variable : kVariables)
    page += fmt::format("| `{}` | {} | {} |\n", variable.name, variable.fallback, variable.meaning);
  page +=
      "\nLaunchers, in the order in which they are tried:\n\n"
      "| launcher | rank | size | ranks on this host | job |\n| --- | --- | --- | --- | --- |\n";
  for (const Launcher& launcher : kLaunchers)
    page += fmt::format("| {} | `{}` | `{}` | `{}` | `{}` |\n", launcher.name, launcher.rank,
                        launcher.size, launcher.local_size, launcher.job);
  return page;
}

}  // namespace expertwire
