// Calls that do not belong together are an error on every rank, that names the other rank and both
// values, in place of wrong values or a wait; the object is dead afterwards and says so.

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>

#include "ranks/requests.hpp"

namespace expertwire::test {
namespace {

using reference::Workload;
using Output = HighThroughput::Output;

constexpr int kRanks = 3, kOdd = 1;  // the rank that makes another call
/// Every rank has tokens for every other.
Workload workload() {
  return Workload({kShape, kRanks, 21, reference::RoutingPattern::parse("uniform")});
}
bool is_odd(const Communicator& communicator) { return communicator.rank() == kOdd; }

/// Expects that `call` finds the odd rank, or, on that rank, any other; and that it names both
/// values. Then that the object is dead.
template <class Object, class Call>
void expect_mismatch(Object& object, const Communicator& communicator,
                     const std::vector<std::string>& values, Call call) {
  try {
    call();
    ADD_FAILURE() << "no error on rank " << communicator.rank();
  } catch (const Error& error) {
    const std::string what = error.what();
    EXPECT_EQ(error.code(), ErrorCode::mismatch) << what;
    EXPECT_EQ(error.rank(), communicator.rank());
    if (is_odd(communicator))
      EXPECT_TRUE(error.peer() == 0 || error.peer() == 2) << what;
    else
      EXPECT_EQ(error.peer(), kOdd) << what;
    for (const std::string& value : values) EXPECT_NE(what.find(value), std::string::npos) << what;
  }
  ASSERT_TRUE(object.status().error);
  EXPECT_EQ(object.status().error->code(), ErrorCode::mismatch);
  expect_error(ErrorCode::failed_earlier, "failed in an earlier call", call);
}

/// What a dispatch returned, and zeros to combine.
template <class Object>
struct Step {
  Request<Object> request;
  typename Object::DispatchResult result;

  Step(Object& object, const Communicator& communicator, const Workload& all, int step)
      : request(communicator, all, step), result(object.dispatch(request.dispatch)) {}
  typename Object::CombineRequest combine() const {
    typename Object::CombineRequest combine;
    combine.y = result.outputs.x;
    combine.handle = result.handle;
    return combine;
  }
};

template <class Object>
void expect_order_of_combines() {
  const Workload all = workload();
  with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
    auto object = Object::create(communicator, {kShape});
    const Step<Object> first(*object, *communicator, all, 0);
    const Step<Object> second(*object, *communicator, all, 1);
    const auto combine = is_odd(*communicator) ? second.combine() : first.combine();
    expect_mismatch(*object, *communicator, {"at dispatch 1", "at dispatch 2"},
                    [&] { object->combine(combine); });
  });
}

TEST(Calls, LowLatencyCombinesInOneOrder) { expect_order_of_combines<LowLatency>(); }
TEST(Calls, HighThroughputCombinesInOneOrder) { expect_order_of_combines<HighThroughput>(); }

TEST(Calls, CachedDispatchesTakeTheSameRouting) {
  const Workload all = workload();
  with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ht = HighThroughput::create(communicator, {kShape});
    const Step<HighThroughput> first(*ht, *communicator, all, 0);
    const Step<HighThroughput> second(*ht, *communicator, all, 0);
    HighThroughput::DispatchRequest again;
    again.x = first.request.dispatch.x;
    again.cached = is_odd(*communicator) ? second.result.handle : first.result.handle;
    expect_mismatch(*ht, *communicator, {"at dispatch 1", "at dispatch 2"},
                    [&] { ht->dispatch(again); });
  });
}

/// A handle of a cached dispatch stands for the dispatch whose routing it has.
TEST(Calls, CachedHandlesStandForTheirRoot) {
  const Workload all = workload();
  with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ht = HighThroughput::create(communicator, {kShape, 2});
    Step<HighThroughput> root(*ht, *communicator, all, 0);
    HighThroughput::DispatchRequest again;
    again.x = root.request.dispatch.x;
    again.cached = root.result.handle;
    const auto other = ht->dispatch(again);
    again.cached = is_odd(*communicator) ? root.result.handle : other.handle;
    const auto last = ht->dispatch(again);
    auto download = [&](const TensorView& view) {
      const TensorView here = root.request.tensors.download(view);
      return std::vector<std::byte>(here.as<std::byte>(), here.as<std::byte>() + view.bytes());
    };
    EXPECT_EQ(last.outputs.x.size(0), root.result.outputs.x.size(0));
    EXPECT_EQ(download(last.outputs.x), download(root.result.outputs.x));
  });
}

TEST(Calls, CachedAndNewRoutings) {
  const Workload all = workload();
  with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ht = HighThroughput::create(communicator, {kShape});
    const Step<HighThroughput> first(*ht, *communicator, all, 0);
    auto again = first.request.dispatch;
    if (is_odd(*communicator)) {
      again.cached = first.result.handle;
      again.topk_idx = {};
    }
    expect_mismatch(*ht, *communicator,
                    {"takes the routing of an earlier dispatch", "sends a new routing"},
                    [&] { ht->dispatch(again); });
  });
}

TEST(Calls, Layouts) {
  const Workload all = workload();
  with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ht = HighThroughput::create(communicator, {kShape});
    Request<HighThroughput> request(*communicator, all, 0);
    if (is_odd(*communicator)) request.dispatch.layout = HighThroughput::Layout::expert_major;
    expect_mismatch(*ht, *communicator, {"has layout expert_major", "token_major"},
                    [&] { ht->dispatch(request.dispatch); });
  });
}

TEST(Calls, CachedDispatchesSendRowsOfOneKind) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "ranks that disagree about the size of a row write into each other's; the "
                  "sanitizer rightly reports it, and all of them get the error";
#endif
  const Workload all = workload();
  with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ht = HighThroughput::create(communicator, {kShape});
    const Step<HighThroughput> first(*ht, *communicator, all, 0);
    HighThroughput::DispatchRequest again;
    again.x = first.request.dispatch.x;
    again.cached = first.result.handle;
    const std::int64_t tokens = again.x.size(0);
    const std::vector<float> scales(static_cast<std::size_t>(tokens), 1.0F);
    reference::Tensors tensors(*communicator);
    if (is_odd(*communicator)) {
      again.x = {again.x.data(), DType::fp8_e4m3, {tokens, kShape.hidden}};
      again.x_scales = tensors.upload({scales.data(), DType::fp32, {tokens, 1}});
    }
    expect_mismatch(*ht, *communicator, {"bf16", "fp8_e4m3"}, [&] { ht->dispatch(again); });
  });
}

/// Dispatches without weights; combine has those of some ranks alone.
TEST(Calls, WeightsComeFromAllRanksOrNone) {
  const Workload all = workload();
  for (const bool odd_gives : {true, false})
    with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
      auto ll = LowLatency::create(communicator, {kShape});
      Request<LowLatency> request(*communicator, all, 0);
      const ConstTensorView weights = request.dispatch.topk_weights;
      request.dispatch.topk_weights = {};
      const auto result = ll->dispatch(request.dispatch);
      LowLatency::CombineRequest combine;
      combine.y = result.outputs.x;
      combine.handle = result.handle;
      if (is_odd(*communicator) == odd_gives) combine.topk_weights = weights;
      expect_mismatch(*ll, *communicator, {"gave topk_weights", "gave none"},
                      [&] { ll->combine(combine); });
    });
}

/// A rank with an empty batch has no weights to give; those of the others come all the same.
TEST(Calls, ARankWithoutTokensHasNoSayAboutWeights) {
  const Workload all = workload();
  with_thread_ranks(kRanks, [&](const std::shared_ptr<Communicator>& communicator) {
    auto at_dispatch = LowLatency::create(communicator, {kShape});
    auto at_combine = LowLatency::create(communicator, {kShape});
    for (int step = 0; step < 3; ++step) {
      Request<LowLatency> request(*communicator, all, step);
      auto dispatch = request.dispatch;
      if (is_odd(*communicator)) {
        dispatch.x = {dispatch.x.data(), kShape.dtype, {0, kShape.hidden}};
        dispatch.topk_idx = {dispatch.topk_idx.data(), DType::int64, {0, kShape.top_k}};
        dispatch.topk_weights = {dispatch.topk_weights.data(), DType::fp32, {0, kShape.top_k}};
      }
      const auto with = at_dispatch->dispatch(dispatch);
      LowLatency::CombineRequest combine;
      combine.y = with.outputs.x;
      combine.handle = with.handle;
      const auto want = at_dispatch->combine(combine);
      const ConstTensorView weights = dispatch.topk_weights;
      dispatch.topk_weights = {};
      const auto without = at_combine->dispatch(dispatch);
      combine.y = without.outputs.x;
      combine.handle = without.handle;
      if (!is_odd(*communicator)) combine.topk_weights = weights;
      const auto got = at_combine->combine(combine);
      ASSERT_EQ(got.out.bytes(), want.out.bytes());
      const TensorView a = request.tensors.download(got.out);
      const TensorView b = request.tensors.download(want.out);
      EXPECT_EQ(std::memcmp(a.data(), b.data(), want.out.bytes()), 0);
    }
  });
}

/// Ranks that exchange no row compare two operations later, whatever those are.
void expect_found_two_operations_later(bool with_new_routings) {
  const MoeShape shape{64, 4, 1, 8, DType::fp32};
  CommunicatorOptions impatient = small_arena();
  impatient.timeout = std::chrono::milliseconds(5000);
  with_thread_ranks(
      2,
      [&](const std::shared_ptr<Communicator>& communicator) {
        auto ht = HighThroughput::create(communicator, {shape});
        reference::Tensors tensors(*communicator);
        // Every rank keeps its tokens.
        const std::vector<std::int32_t> experts(8, 2 * communicator->rank());
        const std::vector<float> values(8 * 64, 1.0F);
        HighThroughput::DispatchRequest request;
        request.x = tensors.upload({values.data(), DType::fp32, {8, 64}});
        const ConstTensorView ids = tensors.upload({experts.data(), DType::int32, {8, 1}});
        request.topk_idx = ids;
        const auto first = ht->dispatch(request), second = ht->dispatch(request);
        request.topk_idx = {};
        expect_mismatch(*ht, *communicator, {"at dispatch 1", "at dispatch 2"}, [&] {
          request.topk_idx = {};
          request.cached = is_odd(*communicator) ? second.handle : first.handle;
          for (int i = 0; i < 3; ++i) {
            const auto result = ht->dispatch(request);
            request.cached = with_new_routings ? Handle() : first.handle;  // the same on both ranks
            if (with_new_routings) request.topk_idx = ids;
          }
        });
      },
      impatient);
}

TEST(Calls, AlsoOfRanksThatExchangeNoRow) {
  expect_found_two_operations_later(false);
  expect_found_two_operations_later(true);
}

}  // namespace
}  // namespace expertwire::test
