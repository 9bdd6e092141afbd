// Tensors that lie where they must not are refused before anything is sent: outputs over inputs or
// over each other, memory of another device, rows with gaps.

#include <gtest/gtest.h>

#include <functional>

#include "ranks/requests.hpp"
#include "reference/space.hpp"

namespace expertwire::test {
namespace {

std::byte* after(const ConstTensorView& tensor, std::ptrdiff_t bytes) {
  return static_cast<std::byte*>(const_cast<void*>(tensor.data())) + bytes;
}

TEST(Apart, LowLatency) {
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    const reference::Workload workload(
        {kShape, 2, 21, reference::RoutingPattern::parse("uniform")});
    auto ll = LowLatency::create(communicator, {kShape});
    Request<LowLatency> request(*communicator, workload, 1);
    const auto result = ll->dispatch(request.dispatch);
    auto over = [&](const char* words, const std::function<void(LowLatency::Outputs&)>& change) {
      auto bad = request.dispatch;
      bad.outputs = result.outputs;
      change(bad.outputs);
      expect_error(ErrorCode::invalid_argument, words, [&] { ll->dispatch(bad); });
    };
    const auto& x = request.dispatch.x;
    const auto& out = result.outputs;
    over("outputs.x at", [&](auto& o) {  // its last row over the first of x
      o.x = {after(x, 128 - static_cast<std::ptrdiff_t>(out.x.bytes())),
             DType::bf16,
             {out.x.size(0), out.x.size(1), out.x.size(2)}};
    });
    over("outputs.ranges at", [&](auto& o) {
      o.ranges = {after(out.source_tokens, 4), DType::int32, {out.ranges.size(0), 2, 2}};
    });
    over("and topk_idx at", [&](auto& o) {
      o.tokens_per_expert = {
          after(request.dispatch.topk_idx, 0), DType::int32, {out.tokens_per_expert.size(0)}};
    });
    LowLatency::CombineRequest combine;
    combine.y = out.x;
    combine.handle = result.handle;
    combine.out = {after(out.x, 128), DType::bf16, {x.size(0), x.size(1)}};
    expect_error(ErrorCode::invalid_argument, "out at", [&] { ll->combine(combine); });
    // None of it consumed an operation.
    combine.out = {};
    ll->combine(combine);
    EXPECT_EQ(round_trip(*ll, *communicator, workload, 2, {}).wrong, 0);
  });
}

TEST(Apart, HighThroughput) {
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    const reference::Workload workload(
        {kShape, 2, 21, reference::RoutingPattern::parse("uniform")});
    auto ht = HighThroughput::create(communicator, with_pool(kShape));
    Request<HighThroughput> request(*communicator, workload, 1);
    request.dispatch.output = HighThroughput::Output::pool;
    const auto pool = ht->dispatch(request.dispatch);
    HighThroughput::CombineRequest combine;
    combine.y = pool.outputs.x;
    combine.handle = pool.handle;
    combine.out = {after(combine.y, 128), DType::bf16, {request.dispatch.x.size(0), kShape.hidden}};
    expect_error(ErrorCode::invalid_argument, "out at", [&] { ht->combine(combine); });
    combine.out = {};
    ht->combine(combine);

    request.dispatch.output = HighThroughput::Output::owned;
    request.dispatch.capacity = 60;
    const auto owned = ht->dispatch(request.dispatch);
    auto bad = request.dispatch;
    bad.outputs = owned.outputs;
    bad.outputs.topk_weights = {
        after(owned.outputs.topk_experts, 16), DType::fp32, {60, kShape.top_k}};
    expect_error(ErrorCode::invalid_argument, "outputs.topk_experts at",
                 [&] { ht->dispatch(bad); });
    EXPECT_EQ(round_trip(*ht, *communicator, workload, 2, {}).wrong, 0);
  });
}

/// The sum may take the place of its initial value: element by element, one is read, then written.
TEST(Apart, TheBiasMayBecomeTheSum) {
  with_thread_ranks(1, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ll = LowLatency::create(communicator, {{64, 4, 1, 2, DType::fp32}});
    reference::Tensors tensors(*communicator);
    const std::vector<float> ones(64, 1.0F), twos(64, 2.0F);
    const std::vector<std::int32_t> id{3};
    LowLatency::DispatchRequest dispatch;
    dispatch.x = tensors.upload({ones.data(), DType::fp32, {1, 64}});
    dispatch.topk_idx = tensors.upload({id.data(), DType::int32, {1, 1}});
    const auto result = ll->dispatch(dispatch);
    const TensorView bias = tensors.make(DType::fp32, {1, 64});
    tensors.write_back(bias, {twos.data(), DType::fp32, {1, 64}});
    LowLatency::CombineRequest combine;
    combine.y = result.outputs.x;
    combine.handle = result.handle;
    combine.bias = combine.out = bias;
    ll->combine(combine);
    const TensorView sum = tensors.download(bias);
    for (int h = 0; h < 64; ++h) EXPECT_EQ(sum.as<float>()[h], 3.0F);
  });
}

/// Every tensor of every operation, said to lie on another device, or with strides.
template <class Object>
void expect_places_matter() {
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    const reference::Workload workload(
        {kShape, 2, 21, reference::RoutingPattern::parse("uniform")});
    const int here = communicator->cuda_device() >= 0 ? communicator->cuda_device() : kHost;
    auto object = Object::create(communicator, {kShape});
    Request<Object> request(*communicator, workload, 1);
    const auto result = object->dispatch(request.dispatch);
    typename Object::CombineRequest combine;
    combine.y = result.outputs.x;
    combine.handle = result.handle;
    const auto home = object->combine(combine);
    const auto dispatch = [&](auto change, const char* words) {
      auto bad = request.dispatch;
      change(bad);
      expect_error(ErrorCode::invalid_argument, words, [&] { object->dispatch(bad); });
    };
    dispatch([](auto& r) { r.x = r.x.on(77); }, "x lies in memory of CUDA device 77");
    dispatch([](auto& r) { r.topk_idx = r.topk_idx.on(77); }, "topk_idx lies in memory");
    dispatch([](auto& r) { r.topk_weights = r.topk_weights.on(77); }, "topk_weights lies in");
    dispatch(
        [](auto& r) {
          r.x = r.x.strided({kShape.hidden + 8, 1});
        },
        "x is bf16 [32, 64] with strides [72, 1]; it must be contiguous bf16");
    dispatch([](auto& r) { r.topk_idx = r.topk_idx.strided({1, 32}); }, "topk_idx is int64");
    const auto back = [&](auto change, const char* words) {
      auto bad = combine;
      change(bad);
      expect_error(ErrorCode::invalid_argument, words, [&] { object->combine(bad); });
    };
    back([](auto& r) { r.y = r.y.on(77); }, "y lies in memory of CUDA device 77");
    back([&](auto& r) { r.out = home.out.on(77); }, "out lies in memory of CUDA device 77");
    // None of it consumed an operation, and what is said right is taken.
    auto good = request.dispatch;
    good.x = good.x.on(here).strided({kShape.hidden, 1});
    combine.handle = object->dispatch(good).handle;
    combine.y = combine.y.on(here);
    object->combine(combine);
    EXPECT_EQ(round_trip(*object, *communicator, workload, 2, {}).wrong, 0);
  });
}

TEST(Places, LowLatency) { expect_places_matter<LowLatency>(); }
TEST(Places, HighThroughput) { expect_places_matter<HighThroughput>(); }

#if defined(EXPERTWIRE_TEST_ON_CUDA)
/// Of memory of which nothing is said, the driver is asked.
TEST(Places, HostMemoryIsRefusedOnCuda) {
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    const reference::Workload workload(
        {kShape, 2, 21, reference::RoutingPattern::parse("uniform")});
    auto object = LowLatency::create(communicator, {kShape});
    Request<LowLatency> request(*communicator, workload, 1);
    auto bad = request.dispatch;
    bad.x = {request.input.x.data(), kShape.dtype, {request.input.tokens, kShape.hidden}};
    expect_error(ErrorCode::invalid_argument, "x lies in memory of the host",
                 [&] { object->dispatch(bad); });
    EXPECT_EQ(round_trip(*object, *communicator, workload, 2, {}).wrong, 0);
  });
}
#endif

}  // namespace
}  // namespace expertwire::test
