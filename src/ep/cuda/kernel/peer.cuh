#pragma once

// The memory by which ranks reach each other: where this rank writes for a peer, and where it finds
// what a peer wrote. Addresses in memory of peers are made here alone.

#include "ep/cuda/kernel/access.cuh"
#include "ep/cuda/kernel/context.hpp"
#include "ep/protocol/slots.hpp"

namespace expertwire::inline v0::ep::cuda {

/// Where this rank writes at `peer`, or at itself.
template <class T>
__device__ __forceinline__ T* outbox(const Context& context, int peer, std::uint64_t offset) {
  return reinterpret_cast<T*>(context.bases[peer] + offset);
}

/// Where this rank finds what peers, or itself, wrote for it.
template <class T>
__device__ __forceinline__ const T* inbox(const Context& context, std::uint64_t offset) {
  return reinterpret_cast<const T*>(context.bases[context.rank] + offset);
}

/// What lies at a peer that is reached by load and store.
template <class T>
__device__ __forceinline__ const T* there(const Context& context, int peer, std::uint64_t offset) {
  return reinterpret_cast<const T*>(context.bases[peer] + offset);
}

/// The words of one direction, which are this rank's own.
__device__ __forceinline__ Direction<KernelAccess> direction(const Context& context,
                                                             const DirectionSlots& place) {
  return {outbox<DirectionWords>(context, context.rank, place.words),
          outbox<Epoch>(context, context.rank, place.consumed)};
}

/// Tells `peer` that what was written for it before belongs to epoch `n`.
__device__ __forceinline__ void announce(const Context& context, int peer, std::uint64_t flag,
                                         Epoch n) {
  ep::publish<KernelAccess>(outbox<Epoch>(context, peer, flag), n);
}

/// Tells `peer` a value of epoch `n`: the `i`-th of the words at `words`.
__device__ __forceinline__ void tell(const Context& context, int peer, std::uint64_t words, int i,
                                     const Tagged& value) {
  ep::tell<KernelAccess>(outbox<Tagged>(context, peer, words) + i, value.value, value.epoch);
}

/// Tells `peer` that this rank has read epoch `n`.
__device__ __forceinline__ void grant(const Context& context, int peer, const DirectionSlots& place,
                                      Epoch n) {
  ep::grant<KernelAccess>(outbox<Epoch>(context, peer, place.consumed) + context.rank, n);
}

}  // namespace expertwire::ep::cuda
