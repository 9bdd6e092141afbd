#include "ep/protocol/slots.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace expertwire::ep {
namespace {

struct Piece {
  std::uint64_t begin, bytes;
};

void expect_disjoint(std::vector<Piece> pieces, std::uint64_t end) {
  std::sort(pieces.begin(), pieces.end(),
            [](const Piece& a, const Piece& b) { return a.begin < b.begin; });
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    const std::uint64_t limit = i + 1 < pieces.size() ? pieces[i + 1].begin : end;
    EXPECT_LE(pieces[i].begin + pieces[i].bytes, limit) << "piece " << i;
  }
}

TEST(Slots, LowLatencyPiecesDoNotOverlap) {
  const SlotSizes sizes{3, 5, 7, 4, 5760, 0};
  const LowLatencySlots s = LowLatencySlots::place(sizes);
  std::vector<Piece> pieces;
  for (const DirectionSlots& d : {s.dispatch, s.combine}) {
    pieces.push_back({d.words, sizeof(DirectionWords)});
    pieces.push_back({d.consumed, 3 * sizeof(Epoch)});
    for (Epoch n = 0; n < DirectionSlots::kHeaderSlots; ++n)
      for (int peer = 0; peer < 3; ++peer)
        pieces.push_back({d.header_of(n, peer), sizeof(CallLine)});
  }
  for (Epoch n : {0U, 1U})
    for (int peer = 0; peer < 3; ++peer) {
      pieces.push_back({s.counts_of(n, peer), (s.kHeader + 5) * sizeof(Tagged)});
      pieces.push_back({s.weight_flag_of(n, peer), sizeof(Epoch)});
      for (int row = 0; row < 7; ++row) {
        pieces.push_back({s.row_of(n, peer, row), s.header_bytes + 5760});
        pieces.push_back({s.row_flag_of(n, peer, row), sizeof(Epoch)});
        pieces.push_back({s.weights_of(n, peer, row), 4 * sizeof(float)});
        pieces.push_back({s.partial_of(n, peer, row), 5760});
        pieces.push_back({s.partial_flag_of(n, peer, row), sizeof(Epoch)});
      }
    }
  expect_disjoint(pieces, s.bytes);
  EXPECT_EQ(s.row_of(1, 2, 3) % 64, 0U);
  EXPECT_GE(s.header_bytes, sizeof(RowHeader) + 4 * sizeof(Selection));
}

TEST(Slots, HighThroughputPiecesDoNotOverlap) {
  const SlotSizes sizes{3, 5, 70, 4, 80, 100, 2};
  const HighThroughputSlots s = HighThroughputSlots::place(sizes);
  EXPECT_EQ(s.chunks(), 3U);
  std::vector<Piece> pieces;
  for (const DirectionSlots& d : {s.dispatch, s.combine}) {
    pieces.push_back({d.words, sizeof(DirectionWords)});
    pieces.push_back({d.consumed, 3 * sizeof(Epoch)});
    for (Epoch n = 0; n < DirectionSlots::kHeaderSlots; ++n)
      for (int peer = 0; peer < 3; ++peer)
        pieces.push_back({d.header_of(n, peer), sizeof(CallLine)});
  }
  for (Epoch n : {0U, 1U}) {
    for (int row = 0; row < 100; ++row) {
      pieces.push_back({s.pool_row_of(n, row, 80), 80});
      pieces.push_back({s.pool_token_of(n, row), 4});
      pieces.push_back({s.pool_experts_of(n, row), 16});
      pieces.push_back({s.pool_weights_of(n, row), 16});
      pieces.push_back({s.pool_scales_of(n, row), 8});
    }
    for (int peer = 0; peer < 3; ++peer) {
      pieces.push_back({s.counts_of(n, peer), (s.kHeader + 8) * sizeof(Tagged)});
      pieces.push_back({s.offer_of(n, peer), sizeof(CombineOffer)});
      pieces.push_back({s.offer_flag_of(n, peer), sizeof(Epoch)});
      for (int chunk = 0; chunk < 3; ++chunk) {
        pieces.push_back({s.row_flag_of(n, peer, chunk), sizeof(Epoch)});
        pieces.push_back({s.partial_flag_of(n, peer, chunk), sizeof(Epoch)});
      }
      for (int row = 0; row < 70; ++row) {
        pieces.push_back({s.partial_of(n, peer, row), 80});
        pieces.push_back({s.partial_weights_of(n, peer, row), 16});
      }
    }
  }
  expect_disjoint(pieces, s.bytes);
}

TEST(Slots, OffsetsGoPast32Bits) {
  const HighThroughputSlots s = HighThroughputSlots::place({8, 32, 16384, 8, 14336, 131072});
  EXPECT_GT(s.pool_row_of(1, 131071, 14336), std::uint64_t{1} << 31);
  EXPECT_EQ(s.pool_row_of(1, 131071, 14336) - s.pool_row_of(1, 0, 14336),
            std::uint64_t{131071} * 14336);
}

// 128 tokens of DeepSeek-V3 in bf16: the design promises about 30 MB on 4 ranks and 60 MB on 8.
TEST(Slots, LowLatencyIsSmall) {
  EXPECT_LE(LowLatencySlots::place({4, 64, 128, 8, 14336, 0}).bytes, 35'000'000U);
  EXPECT_LE(LowLatencySlots::place({8, 32, 128, 8, 14336, 0}).bytes, 64'000'000U);
}

}  // namespace
}  // namespace expertwire::ep
