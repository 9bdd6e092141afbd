#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "ep/cpu/peer.hpp"
#include "ep/cpu/team.hpp"
#include "ep/cpu/vector_ops.hpp"
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
  /// The rows of a token that came home, in the order in which they are added.
  struct HomeRows {
    const void* const* rows;
    int count;
    bool stream = false;  ///< write past the caches
  };
  /// Adds them to the token's bias, if there is one, into its output.
  template <class Combine>
  void sum_home(const Combine& op, int token, const HomeRows& home) const {
    const std::size_t offset = index(token) * shape_.row_bytes();
    const ConstTensorView& bias = op.request.bias;
    SumRequest sum;
    sum.dtype = shape_.dtype;
    sum.elements = index(shape_.hidden);
    sum.rows = home.rows;
    sum.count = home.count;
    sum.init = bias.present() ? bias.as<std::byte>() + offset : nullptr;
    sum.out = op.out.template as<std::byte>() + offset;
    sum.stream = home.stream;
    vector_ops().sum(sum);
  }
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
