#pragma once

// The rows of low-latency dispatch: how a block makes them in its shared memory (images) and sends
// them. See low_latency_dispatch.cu.

#include "ep/cuda/kernel/call.cuh"
#include "ep/cuda/kernel/cast.cuh"
#include "ep/cuda/kernel/courier.cuh"
#include "ep/cuda/kernel/team.cuh"
#include "ep/cuda/kernel/vectors.cuh"
#include "ep/cuda/low_latency/plan.cuh"

namespace expertwire::inline v0::ep::cuda {

// What a block has -------------------------------------------------------------------------------

/// What a team knows of the row that it expands.
struct Expansion {
  std::int32_t places[kMostTopK];  // in the output; below 0: none
  std::int32_t copies;
  bool good;
};

/// Counters of experts lie behind it: [E] so far, [E] in all; then, for the receive half, the first
/// place of each (source, local expert) [E]. Images come last.
struct DispatchShared {
  Plan plan;
  std::byte* image_at[kMostImages];         // payload of each image
  std::uint64_t full[kMostImages];          // barriers of images whose payload is loaded
  Expansion rows[Team::kMostPerBlock][2];   // taken in turn
  std::int32_t rows_to_rank[kMostRanks];    // send: so far
  std::int32_t total_to_rank[kMostRanks];   // send, first block: in all
  std::int32_t first_item[kMostRanks + 1];  // receive: rows before each source's, own rank first
  std::uint32_t digest;                     // receive: see Held::settle()
};

EXPERTWIRE_HOST_DEVICE inline std::uint32_t images_at(int experts) {
  constexpr std::size_t kImageAlignment = 128;
  return static_cast<std::uint32_t>(align_up(
      sizeof(DispatchShared) + 3 * static_cast<std::size_t>(experts) * sizeof(std::int32_t),
      kImageAlignment));
}

__device__ inline std::int32_t* expert_counters(DispatchShared& s) {
  return reinterpret_cast<std::int32_t*>(&s + 1);
}

__device__ inline std::int32_t* first_places(const LowLatencyDispatchParams& p, DispatchShared& s) {
  return expert_counters(s) + 2 * p.shape.placement.experts;
}

__device__ inline std::byte* image_of(const LowLatencyDispatchParams& p, DispatchShared& s, int b) {
  return reinterpret_cast<std::byte*>(&s) + images_at(p.shape.placement.experts) +
         static_cast<std::uint32_t>(b) * p.images.stride;
}

__device__ __forceinline__ bool has_images(const LowLatencyDispatchParams& p) {
  return device::has_bulk_copies() && p.images.whole;
}

/// Whether this rank's own rows are expanded from their images, without a slot or a flag.
__device__ __forceinline__ bool keeps_own(const LowLatencyDispatchParams& p) {
  return has_images(p) && p.keeps_own;
}

/// A planned batch of tokens of a block.
struct Batch {
  Part tokens;
  Epoch n;
  std::uint32_t parity;  // of its images' barriers

  __device__ int count() const { return tokens.end - tokens.begin; }
};

// Making rows ------------------------------------------------------------------------------------

/// Asks for the rows of tokens that will be cast to be brought to L2; a thread a line.
__device__ inline void prefetch_rows(const LowLatencyDispatchParams& p, const Part& tokens) {
  constexpr std::uint64_t kLine = 128;
  const std::uint64_t row = p.shape.slots.sizes.row_bytes;
  const std::byte* begin = p.x + static_cast<std::uint64_t>(tokens.begin) * row;
  const std::byte* end = p.x + static_cast<std::uint64_t>(tokens.end) * row;
#pragma unroll 1
  for (const std::byte* at = begin + threadIdx.x * kLine; at < end; at += blockDim.x * kLine)
    device::prefetch_l2(at);
}

/// Has the copy engine bring the payload of uncast tokens to their images; a lane a token.
__device__ inline void load_images(const LowLatencyDispatchParams& p, DispatchShared& s,
                                   const Part& tokens, bool first) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (!has_images(p) || p.cast) return;
  const int b = static_cast<int>(threadIdx.x) % 32;
  if (b < tokens.end - tokens.begin) {
    if (first) device::mbarrier_init(&s.full[b], 1);
    device::fence_proxy_async_shared();
    device::mbarrier_expect(&s.full[b], p.format.data_bytes);
    device::bulk_load(image_of(p, s, b) + p.shape.slots.header_bytes,
                      p.x + static_cast<std::int64_t>(tokens.begin + b) * p.format.data_bytes,
                      p.format.data_bytes, &s.full[b]);
  }
  __syncwarp();
#endif
}

/// Waits until the payload of an image is there. Copies must not outlive their block.
__device__ __forceinline__ void await_image(const LowLatencyDispatchParams& p, DispatchShared& s,
                                            int b, std::uint32_t parity) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (has_images(p) && !p.cast) device::mbarrier_wait(&s.full[b], parity);
#endif
}

/// Where threads write a row: to its image, or to all its ranks.
struct Places {
  std::byte* const* rows;
  int count;
  std::uint32_t offset;  // of the payload
};

__device__ __forceinline__ Places places_of(const LowLatencyDispatchParams& p, DispatchShared& s,
                                            int b) {
  if (has_images(p)) return {&s.image_at[b], 1, 0};
  return {s.plan.rows[b], p.shape.width, static_cast<std::uint32_t>(p.shape.slots.header_bytes)};
}

template <class Element>
__device__ void cast_to(const LowLatencyDispatchParams& p, const Places& places, const Team& team,
                        std::int64_t token) {
  const std::byte* from = p.x + token * static_cast<std::int64_t>(p.shape.slots.sizes.row_bytes);
  auto write = [&](int chunk, const uint4& codes) {
#pragma unroll 1
    for (int i = 0; i < places.count; ++i)
      if (std::byte* to = places.rows[i])
        reinterpret_cast<uint4*>(to + places.offset)[chunk] = codes;
  };
  auto write_scale = [&](int index, float scale) {
#pragma unroll 1
    for (int i = 0; i < places.count; ++i)
      if (std::byte* to = places.rows[i])
        reinterpret_cast<float*>(to + places.offset + p.format.data_bytes)[index] = scale;
  };
  cast_row<Element>(from, static_cast<int>(p.format.data_bytes), team.thread, team.threads, write,
                    write_scale);
}

/// Writes what lies in memory at `from` to all places; one team. Not inlined: with a copy engine it
/// is not used, and its registers are wanted elsewhere.
__device__ __noinline__ inline void copy_to(Places places, std::uint32_t offset, Team team,
                                            const void* from, int vectors) {
  HeldRow row;
  row.load(from, vectors, team.thread, team.threads);
  copy_held_row(row, from, vectors, team.thread, team.threads, places.count, [&](int i) -> void* {
    return places.rows[i] != nullptr ? places.rows[i] + offset : nullptr;
  });
}

/// The rows of a batch, a team a row, as far as the copy engine does not make them. Workers.
__device__ inline void make_rows(const LowLatencyDispatchParams& p, DispatchShared& s,
                                 const Batch& batch, const Team& team) {
  constexpr int kVector = sizeof(uint4);
  const bool images = has_images(p);
  const int scales = p.cast ? 0 : static_cast<int>(p.format.scales);
#pragma unroll 1
  for (int b = team.in_block; b < batch.count(); b += team.per_block) {
    const Places places = places_of(p, s, b);
    const std::int64_t token = batch.tokens.begin + b;
    if (p.cast)
      with_element(p.shape.dtype,
                   [&](auto element) { cast_to<decltype(element)>(p, places, team, token); });
#pragma unroll 1
    for (int j = team.thread; j < scales; j += team.threads)
#pragma unroll 1
      for (int i = 0; i < places.count; ++i)
        if (std::byte* to = places.rows[i])
          reinterpret_cast<float*>(to + places.offset + p.format.data_bytes)[j] =
              p.x_scales[token * scales + j];
    if (images) continue;
    if (!p.cast)
      copy_to(places, places.offset, team, p.x + token * p.format.data_bytes,
              static_cast<int>(p.format.data_bytes) / kVector);
    copy_to(places, 0, team, image_of(p, s, b),
            static_cast<int>(p.shape.slots.header_bytes) / kVector);
  }
  if (images) device::fence_proxy_async_shared();
}

// Sending rows -----------------------------------------------------------------------------------

/// The rows of a batch, shared out over the senders.
struct Outgoing {
  const LowLatencyDispatchParams& p;
  DispatchShared& s;
  const Batch& batch;

  /// Of this sender.
  __device__ int count() const {
    const int all = batch.count() * p.shape.width;
    return (all - Block::sender() + Block::kSenders - 1) / Block::kSenders;
  }
  __device__ void store(int i, std::uint32_t bytes) const {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    const Target to = target(i);
    await_image(p, s, to.token, batch.parity);
    if (to.row != nullptr) device::bulk_store(to.row, image_of(p, s, to.token), bytes);
    device::bulk_commit();
#endif
  }
  __device__ void release(int i) const {
    const Target to = target(i);
    if (to.row != nullptr) publish<KernelAccess>(to.flag, batch.n);
  }

 private:
  struct Target {
    int token;
    std::byte* row;  // null: nowhere
    Epoch* flag;
  };
  __device__ Target target(int i) const {
    const int pair = i * Block::kSenders + Block::sender();
    const int b = p.shape.by_width.quotient(pair), row = pair - b * p.shape.width;
    return {b, s.plan.rows[b][row], s.plan.flags[b][row]};
  }
};

/// Sends images and releases their flags as they arrive; one lane of a sender.
__device__ inline void send_images(const LowLatencyDispatchParams& p, const Outgoing& rows) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const auto bytes = static_cast<std::uint32_t>(
      p.shape.slots.header_bytes + align_up(p.format.data_bytes + p.format.scale_bytes(), 16));
  const int count = rows.count();
  int sent = 0;
#pragma unroll 1
  for (int released = 0; released < count; ++released) {
#pragma unroll 1
    for (; sent < min(count, released + 1 + device::kMostPending); ++sent) rows.store(sent, bytes);
    device::bulk_wait(sent - released - 1);
    rows.release(released);
  }
#endif
}

/// A sender's part of a batch.
__device__ inline void send_batch(const LowLatencyDispatchParams& p, DispatchShared& s,
                                  const Batch& batch) {
  Block::await_workers();
  const Outgoing rows{p, s, batch};
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (has_images(p)) {
    if (lane == 0) send_images(p, rows);
    __syncwarp();
    return;
  }
#pragma unroll 1
  for (int i = lane; i < rows.count(); i += 32) rows.release(i);
}

}  // namespace expertwire::ep::cuda
