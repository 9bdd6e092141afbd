#pragma once

// Rings: rows of any number pass through few frames. Shared by host and device.
//
// A ring lies in a pair: its writer fills frames, its reader empties them, in the order of their
// numbers. A frame holds one row and what goes beside it. Numbers are 32 bits, run on from
// operation to operation, of both directions, and wrap; frame f lies at place f % C, and C is a
// power of two, so that wrapping is seamless. Every place is a lane of its own (see lane.hpp) whose
// epochs are the numbers f, f + C, f + 2C, ...:
//
//     writer                                  reader
//     ------                                  ------
//     acquire taken[f % C] >= f - C           acquire arrived[f % C] == f
//     write the frame                         read it
//     release arrived[f % C] = f              release taken[f % C] = f, at the writer
//
// Why credit is a word a place, and no count: rows are written and read by many workers, in almost
// any order, and a count would have to wait for the slowest of them.
//
// Why nobody waits in a circle. A row is given to a worker in the order of its ring. A worker
// waits only if nothing that it has been given can move, and after it has announced, or given back,
// everything that it has moved. Then:
//
//   - Dispatch. A reader serves rings as their rows come, and never waits for one while another has
//     some, so every ring that holds a row is emptied. Of the rows that a sender has not written,
//     take the one with the lowest token: all before it in its ring are written, and will be read.
//   - Combine. A writer serves rings as they have room, and never waits for one while another has
//     some. A reader takes tokens in ascending order, and rows come home in the order of their
//     tokens. Of all tokens that are not summed at a rank take the lowest: in each ring to that
//     rank all rows before this token's have been read, so there is room for it.
//
// A sender of a dispatch may wait at one ring while others have room: readers wait for no sender in
// particular. tests/unit/ring_test.cpp walks through all interleavings, and finds each rule missing
// when it is taken away.

#include <cstdint>

#include "ep/protocol/lane.hpp"
#include "ep/protocol/pair.hpp"
#include "expertwire/host_device.hpp"

namespace expertwire::inline v0::ep {

/// The numbers of the last frames that a rank has written for one other, and read from it; in its
/// own memory.
struct RingWords {
  Epoch written;
  Epoch read;
};

/// Where the rings of a lane lie: one in every pair.
struct RingSlots {
  std::uint64_t words = 0;    ///< of the lane: RingWords [R]
  std::uint64_t arrived = 0;  ///< of a pair: Epoch [C], the frame that lies at each place
  std::uint64_t taken = 0;    ///< of a pair: Epoch [C], of the ring that its writer reads
  std::uint64_t rows = 0;     ///< of a pair: [C] frames
  std::uint64_t stride = 0;   ///< from frame to frame
  std::uint32_t frames = 2;   ///< C

  /// Frames follow later: words come first in a pair.
  static constexpr RingSlots place(Placer& own, Placer& pair, std::uint64_t ranks,
                                   std::uint32_t frames) {
    RingSlots ring;
    ring.frames = frames;
    ring.words = own.take(ranks * sizeof(RingWords));
    ring.arrived = pair.take(frames * sizeof(Epoch));
    ring.taken = pair.take(frames * sizeof(Epoch));
    return ring;
  }
  constexpr void place_rows(Placer& pair, std::uint64_t frame_bytes) {
    stride = align_up(frame_bytes, kAlignment);
    rows = pair.take(frames * stride);
  }
  EXPERTWIRE_HOST_DEVICE std::uint32_t at(Epoch frame) const { return frame & (frames - 1); }
  EXPERTWIRE_HOST_DEVICE std::uint64_t words_of(int peer) const {
    return words + static_cast<std::uint64_t>(peer) * sizeof(RingWords);
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t arrived_of(Epoch frame) const {
    return arrived + at(frame) * sizeof(Epoch);
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t taken_of(Epoch frame) const {
    return taken + at(frame) * sizeof(Epoch);
  }
  EXPERTWIRE_HOST_DEVICE std::uint64_t frame_of(Epoch frame) const {
    return rows + at(frame) * stride;
  }
};

/// Whether the writer of a ring of `frames` frames may write `frame`: what lay at its place has
/// been read. `taken` is that place's word.
template <class Access>
EXPERTWIRE_HOST_DEVICE bool has_room(const Epoch* taken, Epoch frame, std::uint32_t frames) {
  return reached(Access::acquire(taken, Fault::credit_acquire), frame - frames) ||
         Access::removed(Fault::credit);
}

/// Frames of a ring, a power of two.
inline constexpr int kFewestFrames = 2, kMostFrames = 4096;

/// The most frames of a ring such that `rings` of them take at most `budget` bytes; two at least,
/// even if they take more.
constexpr std::uint32_t frames_within(std::uint64_t budget, std::uint64_t rings,
                                      std::uint64_t frame_bytes) {
  std::uint32_t frames = kFewestFrames;
  while (frames < kMostFrames && 2 * frames * rings * frame_bytes <= budget) frames *= 2;
  return frames;
}

}  // namespace expertwire::ep
