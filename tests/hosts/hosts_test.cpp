// Ranks on two and three hosts, which network namespaces stand for: whatever goes over the network
// arrives.

#include "hosts/hosts.hpp"

#include "expertwire/low_latency.hpp"
#include "expertwire/memory_channel.hpp"

namespace expertwire::test {
namespace {

#define NEEDS_HOSTS(hosts)                                                           \
  if (!ucx_presence().present) GTEST_SKIP() << "no UCX: " << ucx_presence().why_not; \
  if (!(hosts).why_not().empty()) GTEST_SKIP() << (hosts).why_not()

TEST(TwoHosts, KnowEachOtherAndReachEachOtherByPorts) {
  const Hosts hosts(2);
  NEEDS_HOSTS(hosts);
  const ExitCodes codes = run_on_hosts(hosts, 2, [](const OnHost& on) {
    auto c = Communicator::create(on.bootstrap, small_arena());
    EXPECT_EQ(c->topology().hosts(), 2);
    const int peer = 1 - c->rank();
    EXPECT_EQ(c->path(peer).kind, PathKind::port);
    EXPECT_EQ(c->path(peer).transport, "ucx");
    EXPECT_EQ(c->path(c->rank()).kind, PathKind::mapped);
    EXPECT_EQ(c->port_pair(), std::make_pair(0, 1));
    EXPECT_NE(c->banner().find("ucx to 1 rank (another host, UCX 1."), std::string::npos)
        << c->banner();
    // What loads and stores says that it cannot, and nothing is lost by having asked.
    EXPECT_NE(refusal([&] { MemoryChannel::open_all(c, 64); }, ErrorCode::unsupported)
                  .find("ranks 0 and 1 reach each other over a network alone"),
              std::string::npos);
    EXPECT_THROW(LowLatency::create(c, {{512, 8, 2, 16, DType::bf16}}), Error);
    c->barrier();
    return 0;
  });
  EXPECT_EQ(codes, (ExitCodes{0, 0}));
}

TEST(TwoHosts, StreamsArriveWhole) {
  const Hosts hosts(2);
  NEEDS_HOSTS(hosts);
  const ExitCodes codes = run_on_hosts(hosts, 2, [](const OnHost& on) {
    CommunicatorOptions options = small_arena();
    options.proxies = 1 + on.bootstrap->rank();  // ranks may have different numbers
    auto c = Communicator::create(on.bootstrap, options);
    const SharedMemory memory(*c, Wire::ucx, std::size_t{8} << 20);
    auto channels = PortChannel::open_all(c);
    PortChannel& channel = channels[static_cast<std::size_t>(1 - c->rank())];
    for (const auto& [bytes, messages] : std::vector<std::pair<std::size_t, std::uint64_t>>{
             {8, 5000}, {61, 1000}, {14336, 1000}, {57341, 200}, {1 << 19, 40}}) {
      EXPECT_EQ(stream_to_rank_1(*c, memory, channel, bytes, messages), 0U) << bytes;
      c->barrier();
    }
    return 0;
  });
  EXPECT_EQ(codes, (ExitCodes{0, 0}));
}

TEST(ThreeHosts, EveryPairAtOnceThroughSeveralProxies) {
  const Hosts hosts(3);
  NEEDS_HOSTS(hosts);
  const ExitCodes codes = run_on_hosts(hosts, 3, [](const OnHost& on) {
    CommunicatorOptions options = small_arena();
    options.proxies = 2;
    auto c = Communicator::create(on.bootstrap, options);
    const SharedMemory memory(*c, Wire::ucx, 1 << 20);
    auto channels = PortChannel::open_all(c);
    const auto rank = static_cast<std::uint64_t>(c->rank());
    std::uint64_t wrong = 0;
    for (std::uint64_t n = 1; n <= 200; ++n) {
      for (std::uint64_t p = 0; p < 3; ++p) {
        fill(memory.mine().data() + (1 << 19) + p * 65536, 50001, n * 9 + rank * 3 + p);
        channels[p].put_with_signal({memory.of(static_cast<int>(p)), rank * 65536, memory.mine(),
                                     (1 << 19) + p * 65536, 50001});
        channels[p].atomic_add({memory.of(static_cast<int>(p)), 65536 * 4, -2});
      }
      for (std::uint64_t p = 0; p < 3; ++p) {
        channels[p].wait(kLong);
        wrong += count_wrong(memory.mine().data() + p * 65536, 50001, n * 9 + p * 3 + rank);
        channels[p].signal();
      }
      for (std::uint64_t p = 0; p < 3; ++p) channels[p].wait(kLong);
      for (std::uint64_t p = 0; p < 3; ++p) channels[p].flush(kLong);
    }
    c->barrier();
    EXPECT_EQ(wrong, 0U);
    EXPECT_EQ(static_cast<std::int64_t>(memory.acquire(65536 * 4)), -2 * 3 * 200);
    return 0;
  });
  EXPECT_EQ(codes, (ExitCodes{0, 0, 0}));
}

}  // namespace
}  // namespace expertwire::test
