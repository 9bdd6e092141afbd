// Faults that users reported of other libraries of this kind, each with its input. Nothing here is
// special to this library: every mode and layout must be right with all of them.

#include <gtest/gtest.h>

#include <map>
#include <thread>

#include "ranks/requests.hpp"

namespace expertwire::test {
namespace {

using reference::RoundTripOptions;
using reference::RoutingPattern;
using reference::Workload;
using Layout = HighThroughput::Layout;

MoeShape bf16(int hidden, int experts, int top_k, int max_tokens) {
  return {hidden, experts, top_k, max_tokens, DType::bf16};
}

/// Both modes, high throughput in both layouts.
class EveryPath {
 public:
  EveryPath(const std::shared_ptr<Communicator>& communicator, const MoeShape& most, int lanes = 1,
            int budget = 0)
      : communicator_(communicator) {
    LowLatencyOptions low{most, lanes, budget};
    HighThroughputOptions high{most, lanes, 0, budget};
    low.sms = high.sms = budget;
    low_ = LowLatency::create(communicator, low);
    high_ = HighThroughput::create(communicator, high);
  }
  reference::Report run(const Workload& workload, int step, RoundTripOptions how = {}) {
    reference::Report report = round_trip(*high_, *communicator_, workload, step, how);
    how.layout = Layout::expert_major;
    report += round_trip(*high_, *communicator_, workload, step, how);
    how.layout = Layout::token_major;
    report += round_trip(*low_, *communicator_, workload, step, how);
    return report;
  }

 private:
  std::shared_ptr<Communicator> communicator_;
  std::unique_ptr<LowLatency> low_;
  std::unique_ptr<HighThroughput> high_;
};

TEST(Cases, OddTopK) {
  Reports reports;
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    EveryPath paths(communicator, bf16(32, 64, 22, 128));
    for (const int top_k : {3, 5, 6, 7, 9, 10, 12, 22})
      for (const int experts : {32, 64})
        for (const int tokens : {1, 7, 128}) {
          const Workload workload({bf16(32, experts, top_k, tokens), 2, 5, {}});
          reports.add(paths.run(workload, 0));
        }
  });
}

/// Other budgets on every rank, and the values of the oracle, which knows of none.
TEST(Cases, OddBudgets) {
  Reports reports;
  for (const int budget : {1, 3, 7})
    with_thread_ranks(3, [&](const std::shared_ptr<Communicator>& communicator) {
      EveryPath paths(communicator, bf16(64, 24, 4, 700), 1, budget + communicator->rank());
      const Workload workload({bf16(64, 24, 4, 700), 3, 6, {}});
      for (int step = 0; step < 2; ++step) reports.add(paths.run(workload, step));
    });
}

TEST(Cases, FewTokensWithScales) {
  Reports reports;
  for (int ranks = 1; ranks <= 3; ++ranks)
    with_thread_ranks(ranks, [&](const std::shared_ptr<Communicator>& communicator) {
      EveryPath paths(communicator, bf16(2880, 6 * ranks, 2, 129));
      RoundTripOptions fp8;
      fp8.payload = RoundTripOptions::Payload::fp8;
      for (const int tokens : {1, 3, 127, 129})
        reports.add(paths.run(Workload({bf16(2880, 6 * ranks, 2, tokens), ranks, 7, {}}), 0, fp8));
    });
}

/// Each object lies where another had other words and rows.
TEST(Cases, FlagsOverOldPayload) {
  Reports reports;
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    for (int i = 0; i < 60; ++i) {
      const MoeShape shape =
          bf16(16 * (1 + i * 7 % 23), 8 * (1 + i % 4), 1 + i % 6, 1 + i * 5 % 40);
      EveryPath paths(communicator, shape, 1 + i % 3);
      reports.add(paths.run(Workload({shape, 2, 8, {}, true}), i));
    }
  });
}

TEST(Cases, StartWithoutABarrier) {
  Reports reports;
  with_thread_ranks(3, [&](const std::shared_ptr<Communicator>& communicator) {
    const Workload workload({bf16(16, 12, 3, 6), 3, 9, {}, true});
    reference::Random random{9, static_cast<std::uint64_t>(communicator->rank())};
    for (int round = 0; round < (kOnCuda ? 20 : 100); ++round) {
      std::this_thread::sleep_for(std::chrono::microseconds(random.below(2000)));
      auto object = LowLatency::create(communicator, {workload.spec().shape});
      std::this_thread::sleep_for(std::chrono::microseconds(random.below(2000)));
      reports.add(round_trip(*object, *communicator, workload, round, {}));
    }
  });
}

/// Inputs that a test makes by itself: which experts each token of a rank chooses.
struct Chosen {
  std::vector<std::int64_t> ids;
  int top_k;
  int tokens() const { return static_cast<int>(ids.size()) / top_k; }
};

/// A row says whose it is.
std::vector<float> rows_of(int rank, int tokens, int hidden) {
  std::vector<float> rows;
  for (int t = 0; t < tokens; ++t)
    rows.insert(rows.end(), static_cast<std::size_t>(hidden),
                static_cast<float>(rank * 100'000 + t + 1));
  return rows;
}

struct Sent {
  reference::Tensors tensors;
  HighThroughput::DispatchResult result;
  std::vector<float> rows;

  Sent(HighThroughput& object, const Communicator& communicator, const Chosen& chosen, int hidden,
       const HighThroughput::DispatchRequest& how)
      : tensors(communicator), rows(rows_of(communicator.rank(), chosen.tokens(), hidden)) {
    const std::int64_t tokens = chosen.tokens();
    HighThroughput::DispatchRequest request = how;
    request.x = tensors.upload({rows.data(), DType::fp32, {tokens, hidden}});
    request.topk_idx = tensors.upload({chosen.ids.data(), DType::int64, {tokens, chosen.top_k}});
    request.allocator = tensors.allocator();
    result = object.dispatch(request);
  }
};

/// Four tokens of 16,384, and none at all on the other ranks; all to one rank; and nowhere.
TEST(Cases, ARankWithoutTokens) {
  constexpr int kHidden = 32, kExperts = 128, kTopK = 8;
  with_thread_ranks(4, [&](const std::shared_ptr<Communicator>& communicator) {
    const int rank = communicator->rank();
    auto object =
        HighThroughput::create(communicator, {{kHidden, kExperts, kTopK, 16384, DType::fp32}});
    for (const int to : {0, 3, -1}) {
      const int tokens = to >= 0 && rank == 1 ? 4 : 0;
      Chosen chosen{{}, kTopK};
      for (int t = 0; t < tokens; ++t)
        for (int k = 0; k < kTopK; ++k) chosen.ids.push_back(to * 32 + (t + k) % 32);
      Sent sent(*object, *communicator, chosen, kHidden, {});
      EXPECT_EQ(sent.result.outputs.x.size(0), rank == to ? 4 : 0);
      HighThroughput::CombineRequest back;
      back.y = sent.result.outputs.x;
      back.handle = sent.result.handle;
      back.allocator = sent.tensors.allocator();
      const auto home = object->combine(back);
      const TensorView out = sent.tensors.download(home.out);
      for (int i = 0; i < tokens * kHidden; ++i)
        EXPECT_EQ(out.as<float>()[i], sent.rows[static_cast<std::size_t>(i)]);
    }
  });
}

/// Tokens whose selections are all -1 go nowhere, in either layout: no row is sent for them.
TEST(Cases, PaddingDoesNotTravel) {
  constexpr int kHidden = 32, kTopK = 32;
  with_thread_ranks(2, [&](const std::shared_ptr<Communicator>& communicator) {
    auto object = HighThroughput::create(communicator, {{kHidden, 8, kTopK, 64, DType::fp32}});
    Chosen chosen{std::vector<std::int64_t>(64 * kTopK, -1), kTopK};
    for (std::size_t t = 0; t < 64; t += 2) chosen.ids[t * kTopK + t % kTopK] = 5;  // one of 32
    for (const Layout layout : {Layout::token_major, Layout::expert_major}) {
      HighThroughput::DispatchRequest how;
      how.layout = layout;
      const Sent sent(*object, *communicator, chosen, kHidden, how);
      const int due = communicator->rank() == 1 ? 32 : 0;
      EXPECT_EQ(sent.result.rows_per_source, (std::vector<std::int32_t>{due, due}));
    }
  });
}

/// Experts with just as many rows as make the edges of an alignment.
TEST(Cases, AlignedGroups) {
  constexpr int kHidden = 16, kAlignment = 128;
  const std::vector<int> counts = {0, 1, 127, 128, 129};
  with_thread_ranks(1, [&](const std::shared_ptr<Communicator>& communicator) {
    auto object = HighThroughput::create(communicator, {{kHidden, 5, 1, 0, DType::fp32}});
    Chosen chosen{{}, 1};
    for (int left = 129; left > 0; --left)  // experts take turns
      for (int e = 0; e < 5; ++e)
        if (counts[static_cast<std::size_t>(e)] >= left) chosen.ids.push_back(e);
    HighThroughput::DispatchRequest how;
    how.layout = Layout::expert_major;
    how.expert_alignment = kAlignment;
    Sent sent(*object, *communicator, chosen, kHidden, how);
    const auto values = [&](const TensorView& view) {
      const TensorView here = sent.tensors.download(view);
      return std::vector<std::int32_t>(here.as<std::int32_t>(),
                                       here.as<std::int32_t>() + here.size(0));
    };
    EXPECT_EQ(values(sent.result.expert_offsets),
              (std::vector<std::int32_t>{0, 0, 1, 128, 256, 385}));
    EXPECT_EQ(values(sent.result.group_offsets),
              (std::vector<std::int32_t>{0, 0, 128, 256, 384, 640}));
    EXPECT_EQ(sent.result.rows_per_expert, counts);
    const TensorView x = sent.tensors.download(sent.result.outputs.x);
    std::map<std::int64_t, int> next;  // of each expert
    const auto groups = values(sent.result.group_offsets);
    for (std::size_t t = 0; t < chosen.ids.size(); ++t) {
      const std::int64_t e = chosen.ids[t];
      const std::int64_t row = groups[static_cast<std::size_t>(e)] + next[e]++;
      EXPECT_EQ(x.as<float>()[row * kHidden], static_cast<float>(t + 1));
    }
  });
}

/// Other rows, other weights, and none, by a handle of either layout: local ids, the new weights.
TEST(Cases, CachedDispatchWithNewWeights) {
  constexpr int kHidden = 32, kTopK = 4;
  const Workload workload({{kHidden, 12, kTopK, 40, DType::fp32}, 3, 11, {}, true});
  with_thread_ranks(3, [&](const std::shared_ptr<Communicator>& communicator) {
    auto object = HighThroughput::create(communicator, {workload.spec().shape});
    for (const Layout layout : {Layout::token_major, Layout::expert_major}) {
      Request<HighThroughput> first(*communicator, workload, 2);
      first.dispatch.layout = layout;
      first.dispatch.allocator = first.tensors.allocator();
      const auto root = object->dispatch(first.dispatch);
      std::vector<float> twice = first.input.topk_weights;
      for (float& weight : twice) weight *= 2;
      for (const bool weighted : {true, false}) {
        HighThroughput::DispatchRequest again;
        again.x = first.dispatch.x;
        again.cached = root.handle;
        again.allocator = first.tensors.allocator();
        if (weighted)
          again.topk_weights =
              first.tensors.upload({twice.data(), DType::fp32, {first.input.tokens, kTopK}});
        const auto result = object->dispatch(again);
        const TensorView old_ids = first.tensors.download(root.outputs.topk_experts),
                         ids = first.tensors.download(result.outputs.topk_experts),
                         old = first.tensors.download(root.outputs.topk_weights),
                         weights = first.tensors.download(result.outputs.topk_weights);
        for (std::size_t i = 0; i < ids.bytes() / sizeof(float); ++i) {
          EXPECT_EQ(ids.as<std::int32_t>()[i], old_ids.as<std::int32_t>()[i]);
          EXPECT_EQ(weights.as<float>()[i], weighted ? 2 * old.as<float>()[i] : 0.0F);
        }
      }
    }
  });
}

}  // namespace
}  // namespace expertwire::test
