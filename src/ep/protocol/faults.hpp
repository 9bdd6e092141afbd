#pragma once

#include <cstdint>

namespace expertwire::inline v0::ep {

/// A part of the lane protocol that a test can take away, to see that some test then fails.
enum class Fault : std::uint8_t {
  none,
  credit,          ///< senders do not wait for credit
  credit_acquire,  ///< the load of a credit does not order the stores after it
  credit_release,  ///< a credit does not wait for the reads before it
  flag,            ///< receivers do not wait for flags
  flag_acquire,    ///< the load of a flag does not order the reads after it
  flag_release,    ///< a flag does not wait for the writes before it
};

/// In test builds (EXPERTWIRE_TEST_FAULTS) a fault can be chosen at run time, and every step on a
/// flag, credit or epoch is preceded by a random delay. In all others both vanish.
#if defined(EXPERTWIRE_TEST_FAULTS)
void remove_part(Fault fault) noexcept;
bool removed(Fault fault) noexcept;
/// Delays of up to `microseconds`, on average every fourth step; 0 switches them off.
void set_delays(std::uint32_t microseconds, std::uint64_t seed) noexcept;
void delay() noexcept;
/// CUDA: from now on kernels of `rank` leave without a word when they come to `phase` (as Phase);
/// rank -1: none do.
void stop_rank(int rank, std::int32_t phase) noexcept;
/// What the host chose, for kernels of one rank.
struct KernelFaults {
  Fault removed;
  std::uint32_t longest_delay_ns;
  std::int32_t stop_at;
};
KernelFaults kernel_faults(int rank) noexcept;
#else
constexpr bool removed(Fault) noexcept { return false; }
constexpr void delay() noexcept {}
#endif

}  // namespace expertwire::ep
