// What can happen to a peer or to the network between: each ends within its deadline in an error
// that names peer and phase, or goes on unharmed; the process survives, and the ranks that remain
// make a new job. Every case three times; `make soak` runs them thirty.

#include "hosts/hosts.hpp"

#include <netinet/in.h>
#include <sys/socket.h>

#include <fstream>

namespace expertwire::test {
namespace {

using std::chrono::milliseconds;

#define NEEDS_HOSTS(hosts)                                                           \
  if (!ucx_presence().present) GTEST_SKIP() << "no UCX: " << ucx_presence().why_not; \
  if (!(hosts).why_not().empty()) GTEST_SKIP() << (hosts).why_not()

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr int kTimes = 1;  // they take long, and run three times without
#else
constexpr int kTimes = 3;
#endif
constexpr milliseconds kWait{250};  // of every wait that is to end in an error

/// Ranks exchange messages until something ends it; returns the error.
Error exchange_until_an_error(Communicator& c, const SharedMemory& memory,
                              std::vector<PortChannel>& channels, const OnHost& on) {
  try {
    for (std::uint64_t n = 0;; ++n) {
      if (n == 20) on.ready();
      for (int peer = 0; peer < c.size(); ++peer)
        channels[static_cast<std::size_t>(peer)].put_with_signal(
            {memory.of(peer), static_cast<std::uint64_t>(c.rank()) * 65536, memory.mine(), 1 << 19,
             20000});
      for (PortChannel& channel : channels) channel.wait(kWait);
    }
  } catch (const Error& error) {
    return error;
  }
}

/// The ranks but 1 make a job of their own and use it.
void begin_again(const OnHost& on, int rank, int size) {
  auto c = Communicator::create(on.join_again(rank == 0 ? 0 : rank - 1, size - 1), small_arena());
  auto channels = PortChannel::open_all(c);
  for (PortChannel& channel : channels) channel.signal();
  for (PortChannel& channel : channels) channel.wait(kLong);
  for (PortChannel& channel : channels) channel.flush(kLong);
  c->barrier();
}

class Failure : public testing::TestWithParam<int> {};

TEST_P(Failure, AKilledPeerIsNamedAndTheOthersGoOn) {
  const int ranks = GetParam();
  for (int time = 0; time < kTimes; ++time) {
    const Hosts hosts(ranks);
    NEEDS_HOSTS(hosts);
    const ExitCodes codes = run_on_hosts(
        hosts, ranks,
        [&](const OnHost& on) {
          const int rank = on.bootstrap->rank();
          {
            auto c = Communicator::create(on.bootstrap, small_arena());
            auto channels = PortChannel::open_all(c);
            auto* memory =
                new SharedMemory(*c, Wire::ucx, 1 << 20);  // its barrier is not to be had
            const Error error = exchange_until_an_error(*c, *memory, channels, on);
            EXPECT_EQ(error.code(), ErrorCode::peer_lost) << error.what();
            EXPECT_EQ(error.peer(), 1) << error.what();
            EXPECT_EQ(error.phase(), Phase::channel) << error.what();
            // Whoever asks again is told the same.
            EXPECT_THROW(channels[1].signal(), Error);
            EXPECT_THROW(channels[1].flush(kWait), Error);
          }
          begin_again(on, rank, ranks);
          return 7;
        },
        [](const std::vector<pid_t>& pids) { ::kill(pids[1], SIGKILL); });
    ExitCodes want(static_cast<std::size_t>(ranks), 7);
    want[1] = 128 + SIGKILL;
    EXPECT_EQ(codes, want);
  }
}

INSTANTIATE_TEST_SUITE_P(Hosts, Failure, testing::Values(2, 3),
                         [](const auto& test) { return std::to_string(test.param); });

/// A peer that answers no more, though nothing has broken: the wait ends at its deadline, and once
/// it has been silent for long enough it is taken for dead.
int meet_silence(const OnHost& on) {
  CommunicatorOptions options = small_arena();
  options.peer_timeout = milliseconds(1000);
  auto c = Communicator::create(on.bootstrap, options);
  auto channels = PortChannel::open_all(c);
  auto* memory = new SharedMemory(*c, Wire::ucx, 1 << 20);
  const Error error = exchange_until_an_error(*c, *memory, channels, on);
  EXPECT_EQ(error.code(), ErrorCode::timeout) << error.what();
  EXPECT_EQ(error.peer(), 1 - c->rank()) << error.what();
  EXPECT_EQ(error.phase(), Phase::channel);
  EXPECT_NE(std::string(error.what()).find("250 ms"), std::string::npos) << error.what();
  try {
    channels[static_cast<std::size_t>(1 - c->rank())].wait(kLong);
    ADD_FAILURE() << "nobody signalled";
  } catch (const Error& later) {
    EXPECT_EQ(later.code(), ErrorCode::peer_lost) << later.what();
    EXPECT_EQ(later.peer(), 1 - c->rank()) << later.what();
  }
  return 7;
}

TEST(Failure, AStoppedPeerEndsWaitsAndIsThenTakenForDead) {
  for (int time = 0; time < kTimes; ++time) {
    const Hosts hosts(2);
    NEEDS_HOSTS(hosts);
    const ExitCodes codes = run_on_hosts(
        hosts, 2, meet_silence, [](const std::vector<pid_t>& pids) { ::kill(pids[1], SIGSTOP); });
    EXPECT_EQ(codes, (ExitCodes{7, 128 + SIGKILL}));
  }
}

TEST(Failure, ALinkThatGoesDownEndsWaitsAndPeersAreTakenForDead) {
  for (int time = 0; time < kTimes; ++time) {
    const Hosts hosts(2);
    NEEDS_HOSTS(hosts);
    const ExitCodes codes = run_on_hosts(hosts, 2, meet_silence, [&](const std::vector<pid_t>&) {
      EXPECT_TRUE(hosts.set_link(1, false));
    });
    EXPECT_EQ(codes, (ExitCodes{7, 7}));
  }
}

/// A stream that has to arrive whole whatever the network does; it is disturbed once it runs.
int stream_whole(const OnHost& on, std::size_t bytes, std::uint64_t messages) {
  auto c = Communicator::create(on.bootstrap, small_arena());
  const SharedMemory memory(*c, Wire::ucx, 1 << 21);
  auto channels = PortChannel::open_all(c);
  PortChannel& channel = channels[static_cast<std::size_t>(1 - c->rank())];
  EXPECT_EQ(stream_to_rank_1(*c, memory, channel, bytes, 50), 0U);
  on.ready();
  EXPECT_EQ(stream_to_rank_1(*c, memory, channel, bytes, messages), 0U);
  return 0;
}

TEST(Failure, ALinkThatComesBackHarmsNothing) {
  for (int time = 0; time < kTimes; ++time) {
    const Hosts hosts(2);
    NEEDS_HOSTS(hosts);
    const ExitCodes codes = run_on_hosts(
        hosts, 2, [](const OnHost& on) { return stream_whole(on, 14336, 2000); },
        [&](const std::vector<pid_t>&) {
          EXPECT_TRUE(hosts.set_link(1, false));
          ::usleep(100'000);
          EXPECT_TRUE(hosts.set_link(1, true));
        });
    EXPECT_EQ(codes, (ExitCodes{0, 0}));
  }
}

TEST(Failure, LostPacketsHarmNothing) {
  for (int time = 0; time < kTimes; ++time) {
    const Hosts hosts(2);
    NEEDS_HOSTS(hosts);
    if (!hosts.on(1, "nft add table inet ew"))
      GTEST_SKIP() << "no nft here (nftables): packets cannot be lost on purpose";
    const ExitCodes codes = run_on_hosts(
        hosts, 2, [](const OnHost& on) { return stream_whole(on, 14336, 300); },
        [&](const std::vector<pid_t>&) {
          EXPECT_TRUE(
              hosts.on(1, "nft 'add chain inet ew in { type filter hook input priority 0; }'"));
          EXPECT_TRUE(hosts.on(1, "nft add rule inet ew in numgen random mod 100 '<' 1 drop"));
        });
    EXPECT_EQ(codes, (ExitCodes{0, 0}));
  }
}

TEST(Failure, ASlowLinkHarmsNothing) {
  for (int time = 0; time < kTimes; ++time) {
    const Hosts hosts(2);
    NEEDS_HOSTS(hosts);
    if (!hosts.on(0, "tc qdisc add dev net0 root tbf rate 100mbit burst 32kbit latency 50ms"))
      GTEST_SKIP() << "no tc tbf here: links cannot be made slow";
    const ExitCodes codes =
        run_on_hosts(hosts, 2, [](const OnHost& on) { return stream_whole(on, 57341, 60); });
    EXPECT_EQ(codes, (ExitCodes{0, 0}));
  }
}

/// Ports of TCP on which somebody listens on the calling process's host.
std::vector<int> listening_ports() {
  std::ifstream table("/proc/self/net/tcp");
  std::vector<int> ports;
  std::string line;
  std::getline(table, line);
  while (std::getline(table, line)) {
    unsigned address = 0, port = 0, state = 0;
    if (std::sscanf(line.c_str(), " %*d: %8x:%4x %*8x:%*4x %2x", &address, &port, &state) == 3 &&
        state == 0x0A)
      ports.push_back(static_cast<int>(port));
  }
  return ports;
}

/// Says nonsense at every port on which the ranks of host 0 listen; the number of those.
int babble(const Hosts& hosts) {
  int ports = 0;
  const pid_t pid = ::fork();
  if (pid == 0) {
    if (!hosts.enter(0)) ::_exit(0);
    int reached = 0;
    for (int port : listening_ports()) {
      for (int kind = 0; kind < 4; ++kind) {
        const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        sockaddr_in to{};
        to.sin_family = AF_INET;
        to.sin_port = htons(static_cast<std::uint16_t>(port));
        to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        if (::connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof(to)) == 0 && kind > 0) {
          std::string text(kind == 1 ? 3 : 700, static_cast<char>(kind == 3 ? 0xFF : 'x'));
          ::send(fd, text.data(), text.size(), MSG_NOSIGNAL);
          reached += kind == 1 ? 1 : 0;
        }
        ::close(fd);
      }
    }
    ::_exit(reached);
  }
  int status = 0;
  ::waitpid(pid, &status, 0);
  ports = WIFEXITED(status) ? WEXITSTATUS(status) : 0;
  return ports;
}

TEST(Failure, AStrangerAtThePortsOfTheEngineHarmsNothing) {
  for (int time = 0; time < kTimes; ++time) {
    const Hosts hosts(2);
    NEEDS_HOSTS(hosts);
    int ports = 0;
    const ExitCodes codes = run_on_hosts(
        hosts, 2, [](const OnHost& on) { return stream_whole(on, 14336, 1000); },
        [&](const std::vector<pid_t>&) { ports = babble(hosts); });
    EXPECT_EQ(codes, (ExitCodes{0, 0}));
    EXPECT_GE(ports, 1) << "the engine listened nowhere";
  }
}

RendezvousRequest alone_at(const std::string& address) {
  return {0, 2, address, std::string(32, 's'), milliseconds(200)};
}

TEST(Failure, APortInUseAndANameThatDoesNotResolveAreNamed) {
  const int taken = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in here{};
  here.sin_family = AF_INET;
  here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(here);
  ASSERT_EQ(::bind(taken, reinterpret_cast<sockaddr*>(&here), length), 0);
  ASSERT_EQ(::listen(taken, 1), 0);
  ASSERT_EQ(::getsockname(taken, reinterpret_cast<sockaddr*>(&here), &length), 0);
  const std::string address = "127.0.0.1:" + std::to_string(ntohs(here.sin_port));
  for (int time = 0; time < kTimes; ++time) {
    EXPECT_NE(refusal([&] { bootstrap_from_rendezvous(alone_at(address)); }, ErrorCode::system)
                  .find("cannot listen on " + address),
              std::string::npos);
    EXPECT_NE(refusal([&] {
                bootstrap_from_rendezvous(alone_at("no-such-host.invalid:7001"));
              }).find("'no-such-host.invalid:7001' cannot be resolved"),
              std::string::npos);
  }
  ::close(taken);
}

TEST(Failure, WithoutUcxRanksOfTwoHostsSayWhatTheyMiss) {
  const Hosts hosts(2);
  if (!hosts.why_not().empty()) GTEST_SKIP() << hosts.why_not();
  if (ucx_presence().present) GTEST_SKIP() << "UCX is here; ctest runs this once more without it";
  const ExitCodes codes = run_on_hosts(hosts, 2, [](const OnHost& on) {
    const std::string said =
        refusal([&] { Communicator::create(on.bootstrap, small_arena()); }, ErrorCode::unsupported);
    EXPECT_NE(said.find("EXPERTWIRE_UCX=off"), std::string::npos) << said;
    EXPECT_NE(said.find("another host"), std::string::npos) << said;
    return 7;
  });
  EXPECT_EQ(codes, (ExitCodes{7, 7}));
}

}  // namespace
}  // namespace expertwire::test
