#pragma once

// The memory by which ranks reach each other: where this rank writes for a peer, and where it finds
// what a peer wrote. Addresses in memory of peers are made here alone.

#include "ep/cuda/kernel/access.cuh"
#include "ep/cuda/kernel/context.hpp"
#include "ep/protocol/slots.hpp"

namespace expertwire::inline v0::ep::cuda {

/// Where this rank writes for `peer`, or for itself; `offset` is of a pair.
template <class T>
__device__ __forceinline__ T* outbox(const Context& context, int peer, std::uint64_t offset) {
  return reinterpret_cast<T*>(context.peers[peer].out + offset);
}

/// Where this rank finds words that `source`, or itself, wrote for it; `offset` is of a pair. They
/// are in this rank's own memory, whatever the path.
template <class T>
__device__ __forceinline__ const T* inbox(const Context& context, int source,
                                          std::uint64_t offset) {
  return reinterpret_cast<const T*>(
      context.pairs + static_cast<std::uint64_t>(source) * context.pair_bytes + offset);
}

/// The same of rows, and of all that lies behind the words: where `source` wrote it.
template <class T>
__device__ __forceinline__ const T* rows_from(const Context& context, int source,
                                              std::uint64_t offset) {
  return reinterpret_cast<const T*>(context.peers[source].in + offset);
}

/// A place in the lane of a rank that is reached by load and store: in its pool, or, of this rank's
/// own, its words.
template <class T>
__device__ __forceinline__ T* there(const Context& context, int rank, std::uint64_t offset) {
  return reinterpret_cast<T*>(context.peers[rank].lane + offset);
}

/// Whether a peer is reached through host memory.
__device__ __forceinline__ bool is_staged(const Context& context, int peer) {
  return context.peers[peer].lane == nullptr;
}

/// Blocks of this launch that work, and whether this one is the other (see courier.cuh).
__device__ __forceinline__ int workers(const Context& context) {
  return static_cast<int>(gridDim.x) - context.couriers;
}
__device__ __forceinline__ bool is_courier(const Context& context) {
  return static_cast<int>(blockIdx.x) >= workers(context);
}

/// One direction, seen from this rank.
__device__ __forceinline__ Direction<KernelAccess> direction(const Context& context,
                                                             const DirectionSlots& place) {
  return {there<DirectionWords>(context, context.rank, place.words),
          inbox<Epoch>(context, 0, place.consumed()), context.pair_bytes / sizeof(Epoch)};
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
  ep::grant<KernelAccess>(outbox<Epoch>(context, peer, place.consumed()), n);
}

}  // namespace expertwire::ep::cuda
