#pragma once

#include "expertwire/port_channel.hpp"
#include "ranks/wires.hpp"

namespace expertwire::test {

inline constexpr std::chrono::milliseconds kLong{20000};

/// What a message of that number is made of, byte by byte.
inline void fill(std::byte* data, std::size_t bytes, std::uint64_t message) {
  for (std::size_t i = 0; i < bytes; i += 8) {
    const std::uint64_t word = pattern(message, i);
    std::memcpy(data + i, &word, std::min<std::size_t>(8, bytes - i));
  }
}

inline std::uint64_t count_wrong(const std::byte* data, std::size_t bytes, std::uint64_t message) {
  std::uint64_t wrong = 0;
  for (std::size_t i = 0; i < bytes; i += 8) {
    const std::uint64_t word = pattern(message, i);
    wrong += std::memcmp(data + i, &word, std::min<std::size_t>(8, bytes - i)) != 0 ? 1 : 0;
  }
  return wrong;
}

/// Rank 0 sends messages of `bytes` through `slots` places; every one is complete when its signal
/// is seen. Returns what was wrong at rank 1.
inline std::uint64_t stream_to_rank_1(Communicator& c, const SharedMemory& memory,
                                      PortChannel& channel, std::size_t bytes,
                                      std::uint64_t messages) {
  constexpr std::uint64_t kSlots = 8;
  const std::size_t stride = (bytes + 71) / 64 * 64;
  std::uint64_t wrong = 0;
  for (std::uint64_t m = 0; m < messages; ++m) {
    const std::uint64_t at = m % kSlots * stride + m % 5;  // unaligned
    if (c.rank() == 0) {
      if (m >= kSlots) channel.wait(kLong);  // read: the place and its source are free
      fill(memory.mine().data() + at, bytes, m);
      if (m % 2 == 0) {
        channel.put_with_signal({memory.of(1), at, memory.mine(), at, bytes});
      } else {
        const std::size_t half = bytes / 2;
        channel.put({memory.of(1), at, memory.mine(), at, half});
        channel.put({memory.of(1), at + half, memory.mine(), at + half, bytes - half});
        channel.signal();
      }
    } else {
      channel.wait(kLong);
      wrong += count_wrong(memory.mine().data() + at, bytes, m);
      channel.signal();
    }
  }
  for (std::uint64_t m = messages < kSlots ? 0 : messages - kSlots; c.rank() == 0 && m < messages;
       ++m)
    channel.wait(kLong);
  channel.flush(kLong);
  return wrong;
}

}  // namespace expertwire::test
