// Every wait of the host ends, and what a forked child does is not done in its parent's name.

#include <gtest/gtest.h>
#include <signal.h>

#include <atomic>
#include <thread>

#include "expertwire/memory_channel.hpp"
#include "ranks/processes.hpp"
#include "ranks/requests.hpp"

namespace expertwire::test {
namespace {

using reference::Workload;
using std::chrono::milliseconds;

CommunicatorOptions impatient() {
  CommunicatorOptions options = small_arena();
  options.timeout = milliseconds(150);
  return options;
}

/// A stream that does nothing until it is let go, or for ten seconds.
class HeldStream {
 public:
  HeldStream() {
    stream.enqueue([held = held_] {
      const auto most = Deadline::after(milliseconds(10000));
      while (*held && !most.expired()) std::this_thread::sleep_for(milliseconds(1));
    });
  }
  void let_go() { *held_ = false; }
  Queue stream;

 private:
  std::shared_ptr<std::atomic<bool>> held_ = std::make_shared<std::atomic<bool>>(true);
};

TEST(Waits, ACallBehindAHeldStreamOfItsLaneEndsAtItsDeadline) {
  const Workload workload({kShape, 1, 21, reference::RoutingPattern::parse("uniform")});
  HeldStream held;
  with_thread_ranks(
      1,
      [&](const std::shared_ptr<Communicator>& communicator) {
        auto ll = LowLatency::create(communicator, {kShape});
        Request<LowLatency> request(*communicator, workload, 1);
        request.dispatch.stream = held.stream;
        ll->dispatch(request.dispatch);
        request.dispatch.stream = {};
        expect_error(ErrorCode::timeout, "waited 150 ms for an earlier operation of its lane",
                     [&] { ll->dispatch(request.dispatch); });
        held.let_go();
        EXPECT_THROW(held.stream.synchronize(), Error);  // the object had failed
      },
      impatient());
}

TEST(Waits, CountsBehindAHeldStreamEndAtTheirDeadline) {
  const Workload workload({kShape, 1, 21, reference::RoutingPattern::parse("uniform")});
  HeldStream held;
  with_thread_ranks(
      1,
      [&](const std::shared_ptr<Communicator>& communicator) {
        auto ht = HighThroughput::create(communicator, {kShape});
        Request<HighThroughput> request(*communicator, workload, 1);
        request.dispatch.stream = held.stream;
        expect_error(ErrorCode::timeout, "for its counts", [&] { ht->dispatch(request.dispatch); });
        held.let_go();
        EXPECT_THROW(held.stream.synchronize(), Error);
      },
      impatient());
}

/// What is queued behind other work of the caller's when the object goes runs later, into memory
/// that is still there.
TEST(Waits, ADestructorDoesNotWaitForAHeldStreamForEver) {
  const Workload workload({kShape, 1, 21, reference::RoutingPattern::parse("uniform")});
  with_thread_ranks(
      1,
      [&](const std::shared_ptr<Communicator>& communicator) {
        HeldStream held;
        Request<LowLatency> request(*communicator, workload, 1);
        LowLatency::DispatchResult result;
        {
          auto ll = LowLatency::create(communicator, {kShape});
          request.dispatch.stream = held.stream;
          result = ll->dispatch(request.dispatch);
        }
        held.let_go();
        held.stream.synchronize();
        std::int32_t rows = 0;
        for (int e = 0; e < kShape.experts; ++e)
          rows += result.outputs.tokens_per_expert.as<std::int32_t>()[e];
        EXPECT_GT(rows, 0);
      },
      impatient());
}

// Forks ------------------------------------------------------------------------------------------

/// A data loader's worker holds copies of everything its parent has.
TEST(Forks, ADeathIsFoundThoughAChildLives) {
  const ExitCodes codes = run_processes(3, [](std::shared_ptr<Bootstrap> bootstrap) {
    auto communicator = Communicator::create(std::move(bootstrap), small_arena());
    auto ll = LowLatency::create(communicator, {kShape});
    const Workload workload = workload_for(3);
    Request<LowLatency> request(*communicator, workload, 1);
    ll->dispatch(request.dispatch);
    if (communicator->rank() == 1) {
      if (::fork() == 0) {
        std::this_thread::sleep_for(std::chrono::seconds(4));
        ::_exit(0);
      }
      ::kill(::getpid(), SIGKILL);
    }
    try {
      ll->dispatch(request.dispatch);
    } catch (const Error& error) {
      return error.code() == ErrorCode::peer_lost && error.peer() == 1 ? 7 : 1;
    }
    return 2;
  });
  EXPECT_EQ(codes, (ExitCodes{7, 128 + SIGKILL, 7}));
}

TEST(Forks, AChildThatLetsGoDoesNotTakeLeaveForItsParent) {
  const ExitCodes codes = run_processes(2, [](std::shared_ptr<Bootstrap> bootstrap) {
    auto communicator = Communicator::create(std::move(bootstrap), small_arena());
    auto ll = LowLatency::create(communicator, {kShape});
    auto ht = HighThroughput::create(communicator, {kShape});
    auto channels = MemoryChannel::open_all(communicator, 64);
    auto stream = std::make_unique<Stream>();
    const Workload workload = workload_for(2);
    Request<LowLatency> request(*communicator, workload, 1);
    if (const pid_t child = ::fork(); child == 0) {
      int code = 1;
      try {
        ll->dispatch(request.dispatch);
      } catch (const Error& error) {
        code = error.code() == ErrorCode::invalid_usage &&
                       std::string(error.what()).find("forked child") != std::string::npos
                   ? 0
                   : 2;
      }
      ll.reset();
      ht.reset();
      channels.clear();
      stream.reset();
      communicator.reset();
      ::_exit(code);
    } else {
      int status = 0;
      ::waitpid(child, &status, 0);
      if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) return 10 + WEXITSTATUS(status);
    }
    communicator->barrier();
    if (communicator->find_lost_peer(1 - communicator->rank())) return 3;
    reference::Report report;
    for (int step = 0; step < 3; ++step) {
      report += round_trip(*ll, *communicator, workload, step, {});
      report += round_trip(*ht, *communicator, workload, step, {});
    }
    // Had the child said farewell, the arena would take this object's memory for free.
    const std::size_t before = communicator->arena().carved();
    ll.reset();
    communicator->barrier();
    const bool given_back = communicator->arena().carved() < before;
    communicator->barrier();
    return report.wrong == 0 && report.checked > 0 && given_back ? 7 : 4;
  });
  EXPECT_EQ(codes, (ExitCodes{7, 7}));
}

}  // namespace
}  // namespace expertwire::test
