#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "expertwire/allocator.hpp"
#include "expertwire/communicator.hpp"
#include "expertwire/handle.hpp"
#include "expertwire/shape.hpp"
#include "expertwire/status.hpp"
#include "expertwire/stream.hpp"
#include "expertwire/tensor.hpp"
#include "expertwire/tuning.hpp"

namespace expertwire::inline v0 {

struct HighThroughputOptions {
  /// The most that calls bring: bytes of a row (H of the dtype), E, K, and M tokens a rank. Without
  /// a pool M may be 0: then a rank may dispatch 2^24 tokens, or (2^31 - 1) / R, if that is less.
  MoeShape shape;
  int lanes = 1;  ///< operations that can be in flight independently of each other, 1 to 8
  static constexpr std::int64_t kEveryRow = -1;  ///< R*M rows of a pool, which always suffice
  /// Rows of a receive pool, for Output::pool; a lane has two. 0: no pool. Or kEveryRow.
  std::int64_t pool_rows = 0;
  int threads = 0;  ///< CPU backend: threads a lane works with; 0: EXPERTWIRE_THREADS
  /// CUDA backend: SMs that an operation may use at most; 0: all that this rank has of its device.
  int sms = 0;
  Tuning tuning = {};  ///< CUDA backend
  /// Frames of each ring, a power of two from 2 to 4096; 0: as many as fit 16 MiB over the rings
  /// to other ranks, but two at least, and no more than M tokens need.
  int ring_frames = 0;
};

/// Dispatch and combine for large batches (training, prefill).
///
/// Output is *token-major*: one row per (token, this rank), ordered by source rank, then source
/// token; or *expert-major*: one row per selection, grouped by local expert, ready for a grouped
/// GEMM. Ranks first tell each other how many rows go where. Rows then pass through rings of a few
/// megabytes into memory of the caller's, or are written once, to their final places in a receive
/// pool, if the object was made with one. A token crosses once to every rank, in either layout.
///
/// Lanes and call order are as for LowLatency.
class HighThroughput {
 public:
  /// Where a dispatch leaves its rows.
  enum class Output : std::uint8_t {
    pool = 0,   ///< a view of the receive pool, if there is one: no copy; valid until released
    owned = 1,  ///< the caller's or allocator's memory, filled as rows arrive
  };

  /// How the rows that come are arranged.
  enum class Layout : std::uint8_t {
    token_major = 0,  ///< one row per (token, this rank)
    /// One row per selection of a local expert: a group for each, ascending; in a group by source
    /// rank, then source token. A group is padded with rows of zeros to a multiple of the alignment
    /// asked for. For Output::owned alone: rows are copied to their places in any case.
    expert_major = 1,
  };

  /// N rows. For Output::owned all of them may be given, or none. Rows behind the last that came,
  /// where the capacity had room for more, have source and expert -1, weight and scales 0, and an x
  /// that is left as it was; so have rows that pad a group, with an x of zeros.
  struct Outputs {
    TensorView x;              ///< [N, H]
    TensorView source_tokens;  ///< int32 [N]: index of the token at its source
    /// int32 [N, K]: local expert of each selection, -1 if not here. Expert-major: [N], of the row
    TensorView topk_experts;
    /// fp32 [N, K]: weight of each selection, 0 if not here. Expert-major: [N], of the row
    TensorView topk_weights;
    TensorView scales = {};  ///< fp32 [N, ceil(H/128)] of fp8 rows; else absent
  };

  struct DispatchRequest {
    /// [T, H] of a row type (bf16, fp16, fp32), or fp8_e4m3 with scales; all ranks give the same
    /// (else `Error{mismatch}`). 0 <= T <= M; T may differ between ranks and calls.
    ConstTensorView x;
    ConstTensorView topk_idx;      ///< [T, K] int32 or int64; -1 = no selection
    ConstTensorView topk_weights;  ///< [T, K] fp32, sent along; absent: zeros arrive
    ConstTensorView x_scales;      ///< fp32 [T, ceil(H/128)], with an x of fp8_e4m3
    /// Sizes of this call, which may be other ones in every call; all ranks bring the same (else
    /// `Error{mismatch}`). H and the dtype are those of x, K is that of topk_idx.
    int experts = 0;  ///< E, a multiple of the ranks; 0: that of the options
    /// A handle of this object, in place of topk_idx and capacity: the same routing and T again,
    /// without exchanging counts (the backward pass of combine). To a pool only if that has room
    /// for what the handle's output had room for: its capacity, else the pool's rows or, owned,
    /// R*M.
    Handle cached;
    Output output = Output::owned;  ///< all ranks give the same (else `Error{mismatch}`)
    /// All ranks give the same (else `Error{mismatch}`). A cached dispatch has the handle's.
    Layout layout = Layout::token_major;
    int expert_alignment = 1;  ///< expert-major: of groups, in rows, 1 to 512; may differ by rank
    /// Rows that the output has room for, 0 to the rows of the pool or, owned, to R*M;
    /// expert-major: to R*M*K + L*(alignment - 1), rounded up to the alignment, of an object with
    /// an M. Set: counts stay on the device, a call on a stream does not wait for them, rows past
    /// it are not written. Unset: the output gets exactly the rows that came. All ranks give one,
    /// or none does (else `Error{mismatch}`); the values may differ.
    std::optional<std::int64_t> capacity;
    /// With Output::owned, and a capacity or a cached handle: else N is not known.
    Outputs outputs;
    /// For outputs that were not given and, on CUDA, for the memory of the handle ("handle", of an
    /// expert-major one also "places"), which is in use until the last copy of the handle is gone
    /// and what uses it has run. See allocator.hpp if empty; handles then come from memory of the
    /// object's, which grows.
    Allocator allocator;
    /// None: finished when the call returns; on CUDA, inputs must be ready when it is made. Else
    /// the call returns before rows move, but without a capacity or a cached handle it waits for
    /// counts. Inputs and outputs must live until the stream is synchronized, and the object's
    /// destructor waits for what is queued. A CUDA stream may be capturing if there is a capacity
    /// (or a cached handle) and Output::owned: give outputs then, or an allocator of the graph's
    /// own memory, and order replays with other calls of the communicator yourself. The graph
    /// keeps the object's memory, and handles that lie there, until it is destroyed.
    Stream stream;
    /// Of every wait; unset: the communicator's. A call that must come after one that is queued
    /// behind other work, or waits for its own counts there, waits as long for that, too.
    std::optional<std::chrono::milliseconds> timeout;
    int sms = 0;  ///< CUDA: SMs for this call, at most those of the options; 0: all of those
  };

  struct DispatchResult {
    /// N is the number of rows that came, or the capacity where one was given.
    Outputs outputs;
    /// int32 [1] in memory of the handle (CUDA: of the device): rows that came, also those past the
    /// capacity; expert-major: with those that pad groups.
    TensorView needed_rows;
    /// int32 [R + 1], in the same memory: tokens that came from the ranks before each and, at last,
    /// from all; token-major these are their rows.
    TensorView source_offsets;
    /// Expert-major: int32 [L + 1] in memory of the handle, sums over the groups before each and,
    /// at last, all: of rows that came, and of rows with those that pad. `group_offsets` is where
    /// groups begin; [1:] are the ends that grouped GEMMs take.
    TensorView expert_offsets, group_offsets;
    /// Rows from each source [R], and selections of each local expert [L], if the host knows them:
    /// always without a stream; on a stream without a capacity, or with a cached handle that has
    /// them. On CUDA a cached handle that has not, without a stream, brings rows_per_source alone.
    std::vector<std::int32_t> rows_per_source;
    std::vector<std::int32_t> rows_per_expert;
    Handle handle;
    std::shared_ptr<void> owner;  ///< keeps allocated outputs alive
  };

  struct CombineRequest {
    /// [N, H] of the row type, with the N of the dispatch. Token-major: one row per (token, this
    /// rank), already summed over this rank's experts. The rows of a pool dispatch may be given as
    /// they are (where x of its outputs begins, overwritten; there is room for the row type also
    /// where fp8 rows came): peers then read them there, which saves a copy. Expert-major: what
    /// each expert made of each row; those of a token are added here, and one row goes home.
    ConstTensorView y;
    Handle handle;
    /// Expert-major: fp32 [N], by which rows are multiplied; absent: by 1
    ConstTensorView row_weights;
    /// fp32 [N, K], expert-major [N], to bring home, as dispatch gave them; or absent
    ConstTensorView topk_weights;
    ConstTensorView bias;         ///< [T, H] of the row type, initial value of the sum; or absent
    TensorView out;               ///< [T, H] of the row type; or absent
    TensorView out_topk_weights;  ///< fp32 [T, K]; or absent
    // As in DispatchRequest; a capture does not combine rows of a pool:
    Allocator allocator;
    Stream stream;
    std::optional<std::chrono::milliseconds> timeout;
    int sms = 0;
  };

  struct CombineResult {
    /// [T, H]: bias plus the rows of the token's ranks, added in fp32 in ascending order of rank,
    /// rounded at the end. A row past a rank's capacity counts as zero. Expert-major: a rank's row
    /// is acc = fma(weight, y, acc) over its experts in top-k order, in fp32, rounded once.
    TensorView out;
    /// [T, K], present if topk_weights or out_topk_weights were: each selection's weight from the
    /// rank that held its expert, 0 where there was none.
    TensorView topk_weights;
    std::shared_ptr<void> owner;
  };

  /// Collective. Throws `Error{mismatch}` if ranks disagree on shape, lanes, pool_rows or
  /// ring_frames, `Error{invalid_argument}` for options that cannot be, `Error{capacity}` if the
  /// arena is too small, `Error{unsupported}` if CUDA cannot (more than 128 ranks, 8192 experts, a
  /// pool where two ranks are staged).
  static std::unique_ptr<HighThroughput> create(const std::shared_ptr<Communicator>& communicator,
                                                const HighThroughputOptions& options);
  /// Bytes that an object takes of every rank's arena.
  /// Pairs of staged peers take as much again of host memory.
  static std::size_t memory_bytes(const HighThroughputOptions& options, int ranks);

  ~HighThroughput();
  HighThroughput(const HighThroughput&) = delete;
  HighThroughput& operator=(const HighThroughput&) = delete;

  /// Throws `Error{capacity}` on every rank if some rank's pool is too small for Output::pool and
  /// no capacity was given; the object works on. Throws `Error{invalid_usage}` while the pool
  /// dispatch before last of the lane is still held, and for a capture while pool rows of the lane
  /// are. Other errors are as for LowLatency::dispatch().
  DispatchResult dispatch(const DispatchRequest& request);
  /// Brings rows home and sums them. Releases the pool rows of the handle, if it holds some. Throws
  /// like dispatch(), and `Error{invalid_usage}` for a handle that is empty or another object's,
  /// for pool rows that were released, and for a capture of pool rows.
  CombineResult combine(const CombineRequest& request);
  /// Gives the pool rows of a dispatch back without a combine; without a stream it returns when
  /// that is done. Does nothing if there are none. Throws `Error{invalid_usage}` while capturing.
  void release(const Handle& handle, const Stream& stream = {});
  /// As LowLatency::status().
  Status status() const;

 private:
  struct Impl;
  explicit HighThroughput(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace expertwire
