// Halves of low-latency operations: in which order they may be called, and that a call that is
// refused changes nothing.

#include <gtest/gtest.h>

#include <vector>

#include "ranks/requests.hpp"

namespace expertwire::test {
namespace {

using reference::Workload;

/// Every rank has tokens.
Workload full() { return Workload({kShape, 2, 21, reference::RoutingPattern::parse("uniform")}); }

TEST(Halves, ComeInOrderAndOnce) {
  const Workload workload = full();
  Reports reports;
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ll = LowLatency::create(communicator, {kShape});
    Request<LowLatency> request(*communicator, workload, 1);
    request.dispatch.send_only = true;
    const auto refuse = [&](const char* words, auto call) {
      expect_error(ErrorCode::invalid_usage, words, call);
    };
    const auto first = ll->dispatch(request.dispatch), second = ll->dispatch(request.dispatch);
    refuse("call receive() of the earlier one first", [&] { ll->dispatch(request.dispatch); });
    refuse("receive halves of a lane are called in the order", [&] { ll->receive(second.handle); });
    LowLatency::CombineRequest combine;
    combine.y = first.outputs.x;
    combine.handle = first.handle;
    refuse("has sent only", [&] { ll->combine(combine); });
    refuse("handle is empty", [&] { ll->receive(Handle()); });
    ll->receive(first.handle);
    refuse("no half of this handle is open", [&] { ll->receive(first.handle); });
    ll->receive(second.handle);

    // One handle may have two combines open.
    combine.send_only = true;
    const auto one = ll->combine(combine), other = ll->combine(combine);
    refuse("call receive() of the earlier one first", [&] { ll->combine(combine); });
    ll->receive(first.handle);
    ll->receive(first.handle);
    refuse("no half of this handle is open", [&] { ll->receive(first.handle); });
    const TensorView a = request.tensors.download(one.out), b = request.tensors.download(other.out);
    ASSERT_EQ(a.bytes(), b.bytes());
    EXPECT_EQ(std::vector<std::byte>(a.as<std::byte>(), a.as<std::byte>() + a.bytes()),
              std::vector<std::byte>(b.as<std::byte>(), b.as<std::byte>() + b.bytes()));
    EXPECT_GT(a.bytes(), 0U);
    reports.add(round_trip(*ll, *communicator, workload, 2, {}));
  });
}

/// What is open lies in the handle: it goes with it, and with the object.
TEST(Halves, NeverReceivedHoldNothing) {
  const Workload workload = full();
  std::weak_ptr<void> owner;
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ll = LowLatency::create(communicator, {kShape});
    Request<LowLatency> request(*communicator, workload, 1);
    auto result = ll->dispatch(request.dispatch);
    LowLatency::CombineRequest combine;
    combine.y = result.outputs.x;
    combine.handle = result.handle;
    combine.send_only = true;
    auto open = ll->combine(combine);
    communicator->barrier();
    if (communicator->rank() == 0) owner = open.owner;
  });
  EXPECT_TRUE(owner.expired());
}

}  // namespace
}  // namespace expertwire::test
