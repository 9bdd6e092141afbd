#pragma once

// How kernels are cut to shape, SM budget and links: the formulas. Pure functions, tested without a
// GPU.

#include <algorithm>
#include <cstdint>

#include "expertwire/host_device.hpp"
#include "expertwire/tuning.hpp"

namespace expertwire::inline v0::ep::cuda {

/// Warps of a block of dispatch and combine, and the shared memory of its stages.
inline constexpr int kHighThroughputWarps = 16;
inline constexpr int kFewestReceivers = 5;  ///< of them, where rows come through rings
inline constexpr std::uint32_t kStagesBytes = 8 * 2 * 14336, kFewestStagesBytes = 16384;

// What is on its way ------------------------------------------------------------------------------

/// Of a dispatch: warps of a block that send, and the part of a block's rings that they use.
struct Sending {
  int warps;
  std::uint32_t stages_bytes;
};

struct SendingRequest {
  int blocks;
  double link_bytes_per_us;  ///< what a GPU writes to a peer
  bool owned;                ///< receivers copy rows out of rings, with stages of their own
  bool bulk;                 ///< there are rings
};

/// A piece of a row needs about 8 us from the start of its load to the end of its store while the
/// wire is busy, so speed * 8 us are on their way, over all blocks. More waits in queues, and then
/// SMs that get a small part of the wire end late. As many warps as have two stages of 7 KB or
/// more, and two at least. With owned output receivers need stages as well, and all are used.
/// Without bulk copies there is little on its way, however many warps send.
constexpr Sending sending_of(const SendingRequest& r) {
  constexpr double kJourneyUs = 8;
  constexpr std::uint32_t kStageBytes = 7168, kStages = 2;
  constexpr int kFewestWarps = 2, kMostWarps = 8;
  if (!r.bulk) return {kMostWarps, kStagesBytes};
  const double wanted = r.link_bytes_per_us * kJourneyUs / r.blocks;
  const auto ring = static_cast<std::uint32_t>(
      std::clamp(wanted, static_cast<double>(kFewestWarps * kStages * kStageBytes),
                 static_cast<double>(kStagesBytes)));
  const auto warps = static_cast<int>(ring / (kStages * kStageBytes));
  return {std::clamp(warps, kFewestWarps, kMostWarps), r.owned ? kStagesBytes : ring};
}

/// Warps of a block that push rows home: those, but so many over all blocks that each of `rings`
/// rings has a lane that keeps it (see rings.cuh).
constexpr int pushers_of(const SendingRequest& r, int rings) {
  constexpr int kMostPushers = kHighThroughputWarps / 2, kLanes = 32;
  int warps = sending_of(r).warps;
  while (warps < kMostPushers && warps * r.blocks * kLanes < rings) ++warps;
  return warps;
}

/// The same where what goes home is summed first: rows that pushers read and write beside those of
/// summers, of an even routing. Some warps are left to compare, to announce and to sum.
constexpr int grouped_pushers(int top_k, int ranks) {
  constexpr int kMost = kHighThroughputWarps - 4;
  const int rows = std::min(top_k, ranks);  // of a token that go home, one of them here
  const int pushed = top_k * (ranks - 1) / ranks + rows - 1, summed = top_k / ranks + rows + 1;
  return std::clamp(kHighThroughputWarps * pushed / (pushed + summed), 1, kMost);
}

/// What was asked for in place of the formula's.
constexpr Sending asked_or(const Tuning& asked, const Sending& formula) {
  return {
      asked.sender_warps > 0 ? asked.sender_warps : formula.warps,
      asked.ring_bytes > 0 ? static_cast<std::uint32_t>(asked.ring_bytes) : formula.stages_bytes};
}

/// Blocks that move the rows of a call, of those that its budget allows, where all go through host
/// memory: a few are as fast as it is, and what more of them have on its way delays the courier.
constexpr int staged_workers(int allowed) {
  constexpr int kMost = 8;
  return std::min(allowed, kMost);
}

// Cuts --------------------------------------------------------------------------------------------

/// Some of the items, one behind the other.
struct Part {
  int begin;
  int end;
};

/// Items in order over blocks, as evenly as can be; none for blocks before the `first`. Divided on
/// the host: short kernels feel it.
struct Cut {
  std::int32_t first;
  std::int32_t each;  ///< items of a block
  std::int32_t more;  ///< blocks that have one more

  /// The most that a block has.
  constexpr int most() const { return each + (more > 0 ? 1 : 0); }
  EXPERTWIRE_HOST_DEVICE constexpr Part of(int block) const {
    const int i = block - first;
    if (i < 0) return {0, 0};
    const int begin = i * each + (i < more ? i : more);
    return {begin, begin + each + (i < more ? 1 : 0)};
  }
};

constexpr Cut cut(int items, int blocks, int first) {
  const int parts = blocks - first;
  return {first, items / parts, items % parts};
}

// Images of low-latency rows ----------------------------------------------------------------------

inline constexpr int kMostImages = 8;

/// The shared memory in which a block of low-latency dispatch makes rows before they are sent: as a
/// whole, or, if they do not fit or there is no copy engine, their headers alone.
struct Images {
  std::uint32_t stride;  ///< from one to the next
  std::int32_t count;    ///< tokens that a block has at a time
  bool whole;
};

struct ImagesRequest {
  std::uint32_t header_bytes, row_bytes;
  int tokens;          ///< of a block
  std::uint32_t room;  ///< of shared memory, at least for a header
  bool bulk;           ///< there is a copy engine
};

constexpr Images plan_images(const ImagesRequest& r) {
  constexpr std::uint32_t kLine = 128;
  const std::uint32_t whole = (r.header_bytes + r.row_bytes + kLine - 1) / kLine * kLine;
  const bool fits = r.bulk && whole <= r.room;
  const std::uint32_t stride = fits ? whole : r.header_bytes;
  const int most = std::min(kMostImages, static_cast<int>(r.room / stride));
  return {stride, std::clamp(r.tokens, 1, most), fits};
}

// How rows are cut --------------------------------------------------------------------------------

/// How warps move rows; see pipeline.cuh.
struct Moving {
  std::uint32_t piece_bytes;  ///< of a row; the last piece may be shorter
  std::int32_t pieces;        ///< of a row
  std::int32_t stages;
  std::uint32_t stages_bytes;  ///< of a warp's stages
  bool bulk;
  /// Somebody waits for rows as they come: warps take few at a time, and count them at once. Else a
  /// warp counts when it leaves a chunk.
  bool awaited;
};

/// Rows for `warps` warps of which each has a ring of two stages, of `parts` pieces each. Without
/// bulk copies there are no rings, and a piece is a row.
struct MovingRequest {
  std::uint32_t row_bytes;
  int warps, parts;
  std::uint32_t stages_bytes;  ///< of all warps
  bool bulk;
  bool awaited;
};

constexpr Moving plan_moving(const MovingRequest& r) {
  constexpr std::uint32_t kVector = 16, kLine = 128, kStages = 2;
  Moving moving{r.row_bytes, 1, kStages, 0, r.bulk, r.awaited};
  if (!r.bulk) return moving;
  const auto round_up = [](std::uint32_t bytes) {
    return (bytes + kVector - 1) / kVector * kVector;
  };
  moving.stages_bytes = r.stages_bytes / static_cast<std::uint32_t>(r.warps) / kLine * kLine;
  const std::uint32_t most =
      moving.stages_bytes / (kStages * static_cast<std::uint32_t>(r.parts)) / kVector * kVector;
  const std::uint32_t pieces = (r.row_bytes + most - 1) / most;
  moving.piece_bytes = round_up((r.row_bytes + pieces - 1) / pieces);
  moving.pieces =
      static_cast<std::int32_t>((r.row_bytes + moving.piece_bytes - 1) / moving.piece_bytes);
  return moving;
}

}  // namespace expertwire::ep::cuda
