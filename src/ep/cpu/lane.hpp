#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "ep/cpu/peer.hpp"
#include "ep/cpu/team.hpp"
#include "ep/front/object.hpp"

namespace expertwire::inline v0::ep::cpu {

/// Sizes and places are signed where they are computed, and not where they index.
constexpr std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

/// What a lane of either mode has: memory at all ranks, threads, and the order of its operations.
template <class Slots, class Handle>
class Lane {
 public:
  using Memory = LaneMemory<Slots>;

  Lane(Memory memory, const MoeShape& shape, int workers)
      : memory_(std::move(memory)), shape_(shape), team_(workers) {}

  Turnstile& turnstile() { return turnstile_; }
  /// An operation, or half of one, begins: its H, E, K and M, and the dtype of its rows.
  void use(const MoeShape& shape, DType dtype) {
    shape_ = shape;
    shape_.dtype = dtype;
    memory_.use(shape_);
  }

 protected:
  /// The routing of an operation, as this backend has it.
  template <class Operation>
  static Handle& routing_of(const Operation& op) {
    return static_cast<Handle&>(*op.handle);
  }

  Memory memory_;
  MoeShape shape_;  // of the operation that runs
  Team team_;

 private:
  Turnstile turnstile_;
};

}  // namespace expertwire::ep::cpu
