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

/// What every pair has, and must have among its words.
std::vector<Piece> words_of(const DirectionSlots& d) {
  std::vector<Piece> pieces{{d.control, sizeof(DirectionSlots::Control)}};
  for (Epoch n = 0; n < DirectionSlots::kHeaderSlots; ++n)
    pieces.push_back({d.header_of(n), sizeof(CallLine)});
  return pieces;
}

/// Own words and pairs lie side by side in a lane of three ranks.
template <class Slots>
void expect_pairs(const Slots& s, std::uint64_t end) {
  std::vector<Piece> pieces{{s.dispatch.words, sizeof(DirectionWords)},
                            {s.combine.words, sizeof(DirectionWords)}};
  for (int writer = 0; writer < 3; ++writer) pieces.push_back({s.pairs.of(writer), s.pairs.bytes});
  expect_disjoint(pieces, end);
  EXPECT_EQ(s.pairs.of(1) % kAlignment, 0U);
}

TEST(Slots, LowLatencyPiecesDoNotOverlap) {
  const SlotSizes sizes{3, 5, 7, 4, 5760, 0};
  const LowLatencySlots s = LowLatencySlots::place(sizes);
  expect_pairs(s, s.bytes);
  std::vector<Piece> words, rows;
  for (const DirectionSlots& d : {s.dispatch, s.combine})
    for (const Piece& piece : words_of(d)) words.push_back(piece);
  for (Epoch n : {0U, 1U}) {
    words.push_back({s.counts_of(n), (s.kHeader + 5) * sizeof(Tagged)});
    for (int row = 0; row < 7; ++row) {
      words.push_back({s.row_flag_of(n, row), sizeof(Epoch)});
      words.push_back({s.partial_flag_of(n, row), sizeof(Epoch)});
      rows.push_back({s.row_of(n, row), s.header_bytes + 5760});
      rows.push_back({s.weights_of(n, row), 4 * sizeof(float)});
      rows.push_back({s.partial_of(n, row), 5760});
    }
  }
  expect_disjoint(words, s.pairs.word_bytes);
  rows.push_back({0, s.pairs.word_bytes});
  expect_disjoint(rows, s.pairs.bytes);
  EXPECT_EQ(s.row_of(1, 3) % 64, 0U);
  EXPECT_GE(s.header_bytes, sizeof(RowHeader) + 4 * sizeof(Selection));
}

TEST(Slots, HighThroughputPiecesDoNotOverlap) {
  const SlotSizes sizes{3, 5, 70, 4, 80, 100, 2};
  const HighThroughputSlots s = HighThroughputSlots::place(sizes, 4);
  EXPECT_EQ(s.chunks(), 3U);
  expect_pairs(s, s.bytes);
  std::vector<Piece> words, rows, pool{{0, s.pairs.of(3)}};
  for (const DirectionSlots& d : {s.dispatch, s.combine})
    for (const Piece& piece : words_of(d)) words.push_back(piece);
  for (Epoch n : {0U, 1U}) {
    for (int row = 0; row < 100; ++row) {
      pool.push_back({s.pool_row_of(n, row, 80), 80});
      pool.push_back({s.pool_token_of(n, row), 4});
      pool.push_back({s.pool_experts_of(n, row), 16});
      pool.push_back({s.pool_weights_of(n, row), 16});
      pool.push_back({s.pool_scales_of(n, row), 8});
    }
    words.push_back({s.counts_of(n), (s.kHeader + 8) * sizeof(Tagged)});
    words.push_back({s.offer_of(n), sizeof(CombineOffer)});
    for (int chunk = 0; chunk < 3; ++chunk)
      words.push_back({s.row_flag_of(n, chunk), sizeof(Epoch)});
  }
  for (Epoch frame = 0xFFFFFFFE; frame != 2; ++frame) {
    words.push_back({s.ring.arrived_of(frame), sizeof(Epoch)});
    words.push_back({s.ring.taken_of(frame), sizeof(Epoch)});
    rows.push_back({s.ring.frame_of(frame), s.ring.stride});
  }
  EXPECT_GE(s.ring.stride, 80U + 4 + 2 * 16 + 8);
  expect_disjoint(words, s.pairs.word_bytes);
  rows.push_back({0, s.pairs.word_bytes});
  expect_disjoint(rows, s.pairs.bytes);
  expect_disjoint(pool, s.bytes);
}

TEST(Slots, OffsetsGoPast32Bits) {
  const HighThroughputSlots s = HighThroughputSlots::place({8, 32, 16384, 8, 14336, 131072}, 2);
  EXPECT_GT(s.pool_row_of(1, 131071, 14336), std::uint64_t{1} << 31);
  EXPECT_EQ(s.pool_row_of(1, 131071, 14336) - s.pool_row_of(1, 0, 14336),
            std::uint64_t{131071} * 14336);
}

/// Without a pool an object knows no bound on tokens, and takes little.
TEST(Slots, RingsAreSmall) {
  for (const std::uint64_t ranks : {2, 8, 64, 128}) {
    SlotSizes sizes{ranks, 256 / ranks, 1 << 24, 8, 14336, 0, 112};
    const std::uint32_t frames = HighThroughputSlots::frames_for(sizes, 1);
    const HighThroughputSlots s = HighThroughputSlots::place(sizes, frames);
    const std::uint64_t rings = (ranks - 1) * frames * s.ring.stride;
    EXPECT_LE(rings, HighThroughputSlots::kRingBytes) << ranks;
    EXPECT_GT(2 * rings, HighThroughputSlots::kRingBytes) << ranks;
    EXPECT_LE(s.bytes, rings * 21 / 10) << ranks;
  }
  // Two frames at least, and no more than there are tokens.
  EXPECT_EQ(HighThroughputSlots::frames_for({128, 2, 1 << 24, 8, 1 << 20, 0, 0}, 1), 2U);
  EXPECT_EQ(HighThroughputSlots::frames_for({2, 2, 100, 8, 128, 0, 0}, 1), 128U);
}

// 128 tokens of DeepSeek-V3 in bf16: the design promises about 30 MB on 4 ranks and 60 MB on 8.
TEST(Slots, LowLatencyIsSmall) {
  EXPECT_LE(LowLatencySlots::place({4, 64, 128, 8, 14336, 0}).bytes, 35'000'000U);
  EXPECT_LE(LowLatencySlots::place({8, 32, 128, 8, 14336, 0}).bytes, 64'000'000U);
}

}  // namespace
}  // namespace expertwire::ep
