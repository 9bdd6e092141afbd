#include "expertwire/topology.hpp"

#include <gtest/gtest.h>

#include "expertwire/error.hpp"

namespace expertwire {
namespace {

std::vector<RankPlace> on_hosts(std::initializer_list<const char*> hosts) {
  std::vector<RankPlace> places;
  for (const char* host : hosts) places.emplace_back().host = host;
  return places;
}

TEST(Topology, HostsAreNodes) {
  const Topology topology(on_hosts({"b", "b", "a", "b", "a"}), 0);
  EXPECT_EQ(topology.hosts(), 2);
  EXPECT_EQ(topology.nodes(), 2);
  EXPECT_EQ(topology.node_of(0), 0);
  EXPECT_EQ(topology.node_of(2), 1);
  EXPECT_EQ(topology.ranks_on_host(3), 3);
}

TEST(Topology, OneHostCanStandForSeveralNodes) {
  const Topology topology(on_hosts({"a", "a", "a", "a"}), 2);
  EXPECT_EQ(topology.hosts(), 1);
  EXPECT_EQ(topology.nodes(), 2);
  EXPECT_EQ(topology.node_of(1), 0);
  EXPECT_EQ(topology.node_of(2), 1);
  EXPECT_THROW(Topology(on_hosts({"a", "a", "a"}), 2), Error);
}

TEST(Topology, KnowsThisPlace) {
  const RankPlace a = local_place(), b = local_place();
  EXPECT_EQ(a.process, b.process);
  EXPECT_NE(a.process, 0U);
  EXPECT_GE(a.cores, 1);
  EXPECT_FALSE(a.host.empty());
}

}  // namespace
}  // namespace expertwire
