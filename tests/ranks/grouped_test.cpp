// Rows that are grouped by expert: what is refused, and what outputs say where nothing came.

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "ranks/requests.hpp"

namespace expertwire::test {
namespace {

using reference::RoundTripOptions;
using reference::Tensors;
using reference::Workload;
using Layout = HighThroughput::Layout;
using Output = HighThroughput::Output;

TEST(Grouped, BadRequestsAreNamedAndConsumeNothing) {
  const Workload workload = workload_for(2);
  Reports reports;
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ht = HighThroughput::create(communicator, with_pool(kShape));
    const auto refused = [&](const char* words, auto spoil) {
      Request<HighThroughput> request(*communicator, workload, 0);
      request.dispatch.layout = Layout::expert_major;
      spoil(request.dispatch, request.tensors);
      expect_error(ErrorCode::invalid_argument, words, [&] { ht->dispatch(request.dispatch); });
    };
    using Dispatch = HighThroughput::DispatchRequest;
    refused("expert_alignment is 0; it must be from 1 to 512",
            [](Dispatch& d, Tensors&) { d.expert_alignment = 0; });
    refused("expert_alignment is 513", [](Dispatch& d, Tensors&) { d.expert_alignment = 513; });
    refused("layout is 7", [](Dispatch& d, Tensors&) { d.layout = static_cast<Layout>(7); });
    refused("own the output", [](Dispatch& d, Tensors&) { d.output = Output::pool; });
    // 2 ranks, 32 tokens, 4 selections; 12 local experts.
    refused("capacity is 293; it must be from 0 to the 292 rows", [](Dispatch& d, Tensors&) {
      d.expert_alignment = 4;
      d.capacity = 293;
    });
    refused("outputs.topk_experts is", [](Dispatch& d, Tensors& tensors) {
      d.capacity = 10;
      d.outputs = {tensors.make(kShape.dtype, {10, kShape.hidden}),
                   tensors.make(DType::int32, {10}), tensors.make(DType::int32, {10, kShape.top_k}),
                   tensors.make(DType::fp32, {10})};
    });
    RoundTripOptions how;
    how.layout = Layout::expert_major;
    reports.add(round_trip(*ht, *communicator, workload, 1, how));
  });
}

TEST(Grouped, CombineRefusesWhatDoesNotBelongToTheLayout) {
  const Workload workload = workload_for(2);
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ht = HighThroughput::create(communicator, {kShape});
    Request<HighThroughput> request(*communicator, workload, 0);
    for (const Layout layout : {Layout::token_major, Layout::expert_major}) {
      request.dispatch.layout = layout;
      request.dispatch.allocator = request.tensors.allocator();
      const auto result = ht->dispatch(request.dispatch);
      const bool grouped = layout == Layout::expert_major;
      EXPECT_EQ(result.group_offsets.present(), grouped);
      EXPECT_EQ(result.expert_offsets.present(), grouped);
      HighThroughput::CombineRequest combine;
      combine.y = result.outputs.x;
      combine.handle = result.handle;
      combine.row_weights = request.tensors.make(DType::fp32, {result.outputs.x.size(0) + 1});
      expect_error(ErrorCode::invalid_argument,
                   grouped ? "row_weights is" : "the rows of the handle are token-major",
                   [&] { ht->combine(combine); });
      combine.row_weights = {};
      combine.topk_weights =
          grouped ? request.tensors.make(DType::fp32, {result.outputs.x.size(0), kShape.top_k})
                  : request.tensors.make(DType::fp32, {result.outputs.x.size(0)});
      expect_error(ErrorCode::invalid_argument, "topk_weights is", [&] { ht->combine(combine); });
      combine.topk_weights = {};
      combine.allocator = request.tensors.allocator();
      ht->combine(combine);
    }
  });
}

/// Where rows lie is kept for R*M tokens, so there must be an M; without a capacity there need not.
TEST(Grouped, ACapacityNeedsABoundOnTokens) {
  MoeShape unbounded = kShape;
  unbounded.max_tokens = 0;
  const Workload workload = workload_for(2);
  Reports reports;
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ht = HighThroughput::create(communicator, {unbounded});
    Request<HighThroughput> request(*communicator, workload, 0);
    request.dispatch.layout = Layout::expert_major;
    request.dispatch.capacity = 40;
    expect_error(ErrorCode::invalid_argument, "made without shape.max_tokens",
                 [&] { ht->dispatch(request.dispatch); });
    RoundTripOptions how;
    how.layout = Layout::expert_major;
    how.cached = true;
    for (int step = 0; step < 2; ++step)
      reports.add(round_trip(*ht, *communicator, workload, step, how));
  });
}

TEST(Grouped, AnAllocatorThatThrowsEndsTheCallAndNothingElse) {
  const Workload workload = workload_for(3);
  Reports reports;
  with_thread_ranks(3, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ht = HighThroughput::create(communicator, {kShape});
    RoundTripOptions how;
    how.layout = Layout::expert_major;
    how.alignment = 16;
    for (int step = 0; step < 3; ++step) {
      Request<HighThroughput> request(*communicator, workload, step);
      request.dispatch.layout = Layout::expert_major;
      request.dispatch.expert_alignment = 16;
      const Allocator memory = request.tensors.allocator();
      int given = 0;
      const auto refuses = [&](const AllocationRequest& asked) {
        if (asked.name == "x" || (kOnCuda && step == 2 && given++ == 1))
          throw std::runtime_error("no memory today");
        return memory(asked);
      };
      const bool odd = communicator->rank() == 1;
      request.dispatch.allocator = odd ? Allocator::of(refuses) : memory;
      if (odd)
        EXPECT_THROW(ht->dispatch(request.dispatch), std::runtime_error);
      else
        ht->dispatch(request.dispatch);
      reports.add(round_trip(*ht, *communicator, workload, step, how));
    }
  });
}

/// Rows behind the last that came are nobody's, in both layouts; poison shows what was not written.
TEST(Grouped, TheTailOfACapacityIsNobodys) {
  MoeShape shape = kShape;
  shape.hidden = 256;
  const Workload workload = workload_for(3, shape);
  with_thread_ranks(3, [&](const std::shared_ptr<Communicator>& communicator) {
    auto ht = HighThroughput::create(communicator, {shape});
    for (const Layout layout : {Layout::token_major, Layout::expert_major}) {
      const reference::RankInput input = workload.input(communicator->rank(), 1);
      Tensors tensors(*communicator);
      const std::int64_t tokens = input.tokens, capacity = 3 * shape.max_tokens, k = shape.top_k;
      const bool grouped = layout == Layout::expert_major;
      const std::vector<std::byte> codes(static_cast<std::size_t>(tokens * shape.hidden));
      const std::vector<float> scales(static_cast<std::size_t>(tokens * 2), 1.0F);
      HighThroughput::DispatchRequest request;
      request.x = tensors.upload({codes.data(), DType::fp8_e4m3, {tokens, shape.hidden}});
      request.x_scales = tensors.upload({scales.data(), DType::fp32, {tokens, 2}});
      request.topk_idx = tensors.upload({input.topk_idx.data(), DType::int64, {tokens, k}});
      request.layout = layout;
      request.capacity = capacity;
      request.outputs = {tensors.make(DType::fp8_e4m3, {capacity, shape.hidden}),
                         tensors.make(DType::int32, {capacity}),
                         grouped ? tensors.make(DType::int32, {capacity})
                                 : tensors.make(DType::int32, {capacity, k}),
                         grouped ? tensors.make(DType::fp32, {capacity})
                                 : tensors.make(DType::fp32, {capacity, k}),
                         tensors.make(DType::fp32, {capacity, 2})};
      const auto poison = [&](const TensorView& view) {
        const TensorView here = tensors.download(view);
        std::memset(here.data(), 0xFF, here.bytes());
        tensors.write_back(view, here);
      };
      const HighThroughput::Outputs& o = request.outputs;
      for (const TensorView& view :
           {o.x, o.source_tokens, o.topk_experts, o.topk_weights, o.scales})
        poison(view);
      const auto result = ht->dispatch(request);
      const std::int32_t came = *tensors.download(result.needed_rows).as<std::int32_t>();
      EXPECT_LT(came, capacity);
      const TensorView source = tensors.download(o.source_tokens),
                       experts = tensors.download(o.topk_experts),
                       weights = tensors.download(o.topk_weights),
                       scales_out = tensors.download(o.scales);
      const std::int64_t width = grouped ? 1 : k;
      for (std::int64_t row = came; row < capacity; ++row) {
        EXPECT_EQ(source.as<std::int32_t>()[row], -1) << row;
        for (std::int64_t i = row * width; i < (row + 1) * width; ++i) {
          EXPECT_EQ(experts.as<std::int32_t>()[i], -1) << row;
          EXPECT_EQ(weights.as<float>()[i], 0.0F) << row;
        }
        EXPECT_TRUE(std::isfinite(scales_out.as<float>()[2 * row])) << row;
        EXPECT_TRUE(std::isfinite(scales_out.as<float>()[2 * row + 1])) << row;
      }
      for (std::int64_t row = 0; row < came; ++row)
        EXPECT_GE(source.as<std::int32_t>()[row], 0) << row;
    }
  });
}

}  // namespace
}  // namespace expertwire::test
