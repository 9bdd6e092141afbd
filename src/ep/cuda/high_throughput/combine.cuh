#pragma once

// What the roles of combine share: offers, and where the rows of a token are.

#include "ep/cuda/high_throughput/groups.cuh"

namespace expertwire::inline v0::ep::cuda {

// Roles: offers ----------------------------------------------------------------------------------

__device__ __forceinline__ Saying saying(const HighThroughputCombineParams& p, Epoch n) {
  return {p.context, p.shape.slots.combine, n, p.call, *p.epoch};
}

/// The offer to every rank; before it, where rows are pulled, the weights that go home with them.
/// The first block.
__device__ inline void send_offers(const HighThroughputCombineParams& p, Epoch n) {
  const Context& c = p.context;
  const HighThroughputSlots& slots = p.shape.slots;
  if (p.pull && p.topk_weights != nullptr) {
    auto* beside = there<float>(c, c.rank, slots.pool_weights_of(*p.epoch, 0));
    const int all = min(p.routing.first_from[c.size], p.routing.capacity[c.rank]) * p.shape.top_k;
    for (int i = threadIdx.x; i < all; i += blockDim.x) beside[i] = p.topk_weights[i];
  }
  const CombineOffer offer{p.pull ? 1 : 0, p.topk_weights != nullptr ? 1 : 0};
  for (int peer = threadIdx.x; peer < c.size; peer += blockDim.x)
    *outbox<CombineOffer>(c, peer, slots.offer_of(n)) = offer;
  tell_call(saying(p, n), static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
  __syncthreads();
  for (int peer = threadIdx.x; peer < c.size; peer += blockDim.x)
    announce(c, peer, slots.combine.flag_of(n), n);
}

/// One warp.
__device__ inline bool await_offers(const HighThroughputCombineParams& p, Epoch n) {
  const Context& c = p.context;
  bool good = true;
  for (int peer = static_cast<int>(threadIdx.x) % 32; peer < c.size && good; peer += 32) {
    const auto* flag = inbox<Epoch>(c, peer, p.shape.slots.combine.flag_of(n));
    good = wait_until(c, peer, Phase::counts, n, [&] { return arrived<KernelAccess>(flag, n); });
  }
  __syncwarp();  // what one lane acquired, all may read
  return __all_sync(kAllLanes, good);
}

__device__ __forceinline__ CombineOffer offer_of(const HighThroughputCombineParams& p, int rank,
                                                 Epoch n) {
  return *inbox<CombineOffer>(p.context, rank, p.shape.slots.offer_of(n));
}

// Rows that go home ------------------------------------------------------------------------------

/// Rows that this rank pushes, and whether they are so few that their warps announce them.
__device__ __forceinline__ int rows_home(const HighThroughputCombineParams& p,
                                         const BlockShared& s) {
  const Context& c = p.context;
  int rows = 0;
  for (int i = 1; i < c.size; ++i) rows += s.rows_from(c, p.routing, (c.rank + i) % c.size);
  return rows;
}
__device__ __forceinline__ bool is_direct(const HighThroughputCombineParams& p,
                                          const BlockShared& s) {
  return rows_home(p, s) <= p.pushers * writing_blocks(p.context);
}

/// The copies of a token that came, the i-th of a source; all lanes call.
__device__ __forceinline__ Copies copies_of(const HighThroughputCombineParams& p, int source,
                                            int i) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Copies copies;
  if (lane < p.shape.top_k) copies.place = places_of(p.routing, p.shape.top_k, source, i)[lane];
  if (copies.place >= 0 && p.row_weights != nullptr) copies.weight = p.row_weights[copies.place];
  return copies;
}
/// What goes home beside the row: this lane's selection's.
__device__ __forceinline__ float weight_home(const HighThroughputCombineParams& p,
                                             const Copies& copies) {
  return copies.place >= 0 ? p.topk_weights[copies.place] : 0.0F;
}

// Rows that came home ----------------------------------------------------------------------------

/// Where this lane's row of a token comes from, if it comes.
struct Origin {
  Destination from{-1, -1};  ///< rank below 0: it had no room there, and counts as zero
  bool framed = false;
};

/// The tokens of one warp and where their rows are.
struct Summer {
  const HighThroughputCombineParams& p;
  BlockShared& s;
  Epoch n, dispatched;  // epochs of this combine, and of the dispatch whose pool rows are read

  __device__ __forceinline__ Origin origin(int token, int lane) const {
    Origin o;
    if (lane < p.shape.width)
      o.from = p.routing.destinations[static_cast<std::int64_t>(token) * p.shape.width + lane];
    if (o.from.rank >= 0 && !s.run_at(o.from.rank).has_room(static_cast<std::uint32_t>(o.from.row)))
      o.from.rank = -1;
    o.framed =
        o.from.rank >= 0 && o.from.rank != p.context.rank && offer_of(p, o.from.rank, n).pull == 0;
    return o;
  }
  __device__ __forceinline__ Epoch frame_of(const Destination& from) const {
    return s.frames_from[from.rank] + static_cast<Epoch>(from.row);
  }
  __device__ __forceinline__ const RingSlots& ring() const { return p.shape.slots.ring; }

  /// Whether the rows of a token are all there; all lanes call. With `wait` it waits for them, and
  /// false means that the wait was given up.
  __device__ __forceinline__ bool there_are_all(const Origin& o, bool wait) const {
    const auto come = [&] { return has_come(p.context, ring(), o.from.rank, frame_of(o.from)); };
    bool is_there = !o.framed || come();
    if (!is_there && wait)
      is_there = wait_until(p.context, o.from.rank, Phase::combine_rows,
                            static_cast<std::uint64_t>(o.from.row), come);
    is_there = __all_sync(kAllLanes, is_there);
    __syncwarp();  // what one lane acquired, all may read
    return is_there;
  }
  /// This lane's row, which is there; null if there is none.
  __device__ __forceinline__ const std::byte* row_of(const Origin& o) const {
    const Context& c = p.context;
    const HighThroughputSlots& slots = p.shape.slots;
    if (o.from.rank < 0) return nullptr;
    if (o.framed) return frame_from(c, ring(), o.from.rank, frame_of(o.from));
    const std::uint32_t row = s.run_at(o.from.rank).place(static_cast<std::uint32_t>(o.from.row));
    if (o.from.rank == c.rank) return p.y + static_cast<std::uint64_t>(row) * slots.sizes.row_bytes;
    return there<std::byte>(c, o.from.rank,
                            slots.pool_row_of(dispatched, row, slots.sizes.row_bytes));
  }
  /// The weights beside that row.
  __device__ __forceinline__ const float* weights_of(const Origin& o) const {
    const Context& c = p.context;
    const HighThroughputSlots& slots = p.shape.slots;
    if (o.from.rank < 0 || offer_of(p, o.from.rank, n).weights == 0) return nullptr;
    if (o.framed) return reinterpret_cast<const float*>(row_of(o) + slots.combined.weights);
    const std::uint32_t row = s.run_at(o.from.rank).place(static_cast<std::uint32_t>(o.from.row));
    if (o.from.rank == c.rank) return p.topk_weights + std::uint64_t{row} * p.shape.top_k;
    return there<float>(c, o.from.rank, slots.pool_weights_of(dispatched, row));
  }

  /// Writes the weights of a token that came home; all lanes call.
  __device__ __forceinline__ void take_weights(int token, int lane, const Origin& o) const {
    std::int32_t expert = -1;
    const std::int64_t i = static_cast<std::int64_t>(token) * p.shape.top_k + lane;
    if (lane < p.shape.top_k) expert = p.routing.experts[i];
    const int rank = expert >= 0 ? p.shape.placement.rank_of(expert) : -1;
    const auto* mine = reinterpret_cast<const std::byte*>(weights_of(o));
    float weight = 0;
    for (int j = 0; j < p.shape.width; ++j) {
      const int other = __shfl_sync(kAllLanes, o.from.rank, j);
      const auto weights = __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(mine), j);
      if (rank >= 0 && other == rank && weights != 0)
        weight = reinterpret_cast<const float*>(weights)[lane];
    }
    if (lane < p.shape.top_k) p.out_topk_weights[i] = weight;
  }
  /// The same where rows are grouped, of which this rank's own token has `copies`, if it has.
  __device__ __forceinline__ void take_weights(int token, int lane, const Origin& o,
                                               const Copies& copies) const {
    Origin others = o;
    if (others.from.rank == p.context.rank) others.from.rank = -1;
    take_weights(token, lane, others);
    if (copies.place >= 0)
      p.out_topk_weights[static_cast<std::int64_t>(token) * p.shape.top_k + lane] =
          weight_home(p, copies);
  }
  /// The rows of a token have been read, and what lies beside them; all lanes call.
  __device__ __forceinline__ void finish(const Origin& o, Owed* owed) const {
    __syncwarp();
    owed->give_back(p.context, ring());
    if (o.framed) owed->set(o.from.rank, frame_of(o.from));
  }
};

}  // namespace expertwire::ep::cuda
