#pragma once

#include <chrono>
#include <memory>
#include <optional>

#include "expertwire/allocator.hpp"
#include "expertwire/communicator.hpp"
#include "expertwire/handle.hpp"
#include "expertwire/shape.hpp"
#include "expertwire/status.hpp"
#include "expertwire/stream.hpp"
#include "expertwire/tensor.hpp"

namespace expertwire::inline v0 {

struct LowLatencyOptions {
  /// The most that calls bring: bytes of a row (H of the dtype), E, K, and M tokens a rank; E*M,
  /// the rows of an output, is below 2^31.
  MoeShape shape;
  int lanes = 1;    ///< operations that can be in flight independently of each other, 1 to 8
  int threads = 0;  ///< CPU backend: threads a lane works with; 0: EXPERTWIRE_THREADS
  /// CUDA backend: SMs that an operation may use at most; 0, or more than this rank has of its
  /// device: all of those.
  int sms = 0;
};

/// Dispatch and combine for small batches (decoding): every byte goes straight to its place, sizes
/// are fixed by the shape, nothing is exchanged with the host.
///
/// Output is *expert-major*: `x[L, R*M, H]` holds, for each local expert, the rows that chose it,
/// packed at the front, ordered by source rank, then source token. The wire carries one row per
/// (token, rank); combine sums what one rank's experts made of a token before it sends.
///
/// Operations use the lanes in turn: the n-th dispatch of every rank uses lane n mod `lanes`, and a
/// combine uses the lane of its dispatch. All ranks make the same calls in the same order. One
/// thread at a time may call an object.
///
/// Data of x, y, bias, out and outputs.x is aligned to 16 bytes, all other to its elements. Outputs
/// lie apart from inputs and from each other; `out` may be `bias`, which the sum then replaces.
class LowLatency {
 public:
  /// All that the rows have, or none: absent outputs come from the allocator.
  struct Outputs {
    TensorView x;                  ///< [L, R*M, H]; rows past a count are left as they were
    TensorView tokens_per_expert;  ///< int32 [L]; at most R*M, see Status::dropped_rows
    TensorView ranges;             ///< int32 [L, R, 2]: rows from each source, and the first
    TensorView source_tokens;      ///< int32 [L, R*M]: index of the token at its source
    TensorView scales = {};        ///< fp32 [L, R*M, ceil(H/128)] of fp8 rows; else absent
  };

  struct DispatchRequest {
    /// [T, H] of a row type (bf16, fp16, fp32), or fp8_e4m3; 0 <= T <= M. T may differ between
    /// ranks and calls.
    ConstTensorView x;
    ConstTensorView topk_idx;      ///< [T, K] int32 or int64; -1 = no selection
    ConstTensorView topk_weights;  ///< [T, K] fp32: weights for combine; or absent
    ConstTensorView x_scales;      ///< fp32 [T, ceil(H/128)], with an x of fp8_e4m3
    /// Sizes of this call, which may be other ones in every call; all ranks bring the same (else
    /// `Error{mismatch}`). H and the dtype are those of x, K is that of topk_idx.
    int experts = 0;     ///< E, a multiple of the ranks; 0: that of the options
    int max_tokens = 0;  ///< M; 0: that of the options. Outputs have R*M rows an expert
    /// Rows of the row type travel and arrive as fp8_e4m3, a scale for every 128 channels of a
    /// token: a = max(|x|, 1e-4) over them, scale = a / 448, value = x * (448 / a), rounded to
    /// nearest even. H is a multiple of 16. On all ranks rows arrive as one dtype (else
    /// `Error{mismatch}`).
    bool cast_to_fp8 = false;
    Outputs outputs;
    /// For outputs that were not given and, on CUDA, for the memory of the handle ("handle"), which
    /// is in use until the last copy of the handle is gone and what uses it has run. See
    /// allocator.hpp if empty; handles then come from memory of the object's, which grows.
    Allocator allocator;
    /// None: finished when the call returns; on CUDA, inputs must be ready when it is made. Else
    /// inputs and outputs must live until the stream is synchronized, and the object's destructor
    /// waits for what is queued. A CUDA stream may be capturing: give outputs then, or an
    /// allocator of the graph's own memory, and order replays with other calls of the communicator
    /// yourself. The graph keeps the object's memory, and handles that lie there, until it is
    /// destroyed.
    Stream stream;
    /// Of every wait of this operation, its receive half too; unset: the communicator's. A call
    /// that must come after one that is queued behind other work waits as long for that, too.
    std::optional<std::chrono::milliseconds> timeout;
    int sms = 0;  ///< CUDA: SMs for this call, at most those of the options; 0: all of those
    /// Gives the lane the send half alone; receive() gives it the other. Inputs must stay as they
    /// are until that has run. Between the two nothing of ours runs. Two send halves of a lane may
    /// wait for their receive halves, which come in the same order.
    bool send_only = false;
  };

  struct DispatchResult {
    Outputs outputs;  ///< as given, or as allocated; filled once the stream got there
    Handle handle;
    std::shared_ptr<void> owner;  ///< keeps allocated outputs alive
  };

  struct CombineRequest {
    ConstTensorView y;  ///< [L, R*M, H] of a row type (after fp8, too), rows as dispatch put them
    Handle handle;
    /// [T, K] fp32, for weights that dispatch did not have. All ranks that have tokens give them,
    /// or none does (else `Error{mismatch}`). Given in neither call they are 1.
    ConstTensorView topk_weights;
    ConstTensorView bias;  ///< [T, H] of the row type, initial value of the sum; or absent
    TensorView out;        ///< [T, H] of the row type; or absent
    // As in DispatchRequest:
    Allocator allocator;
    Stream stream;
    std::optional<std::chrono::milliseconds> timeout;
    int sms = 0;
    bool send_only = false;
  };

  struct CombineResult {
    /// [T, H]: bias plus, over ascending ranks, the rank's partial sum. The partial is
    /// fma(w, y, acc) in fp32 in top-k order, rounded to the row type; so is the end.
    TensorView out;
    std::shared_ptr<void> owner;
  };

  /// Collective. Throws `Error{mismatch}` if ranks disagree on shape or lanes,
  /// `Error{invalid_argument}` for options that cannot be, `Error{capacity}` if the arena is too
  /// small, `Error{unsupported}` if CUDA cannot (more than 128 ranks, 8192 experts).
  static std::unique_ptr<LowLatency> create(const std::shared_ptr<Communicator>& communicator,
                                            const LowLatencyOptions& options);
  /// Bytes that an object takes of every rank's arena.
  /// Pairs of staged peers take as much again of host memory.
  static std::size_t memory_bytes(const LowLatencyOptions& options, int ranks);

  ~LowLatency();
  LowLatency(const LowLatency&) = delete;
  LowLatency& operator=(const LowLatency&) = delete;

  /// Sends the tokens to their experts, and fills the outputs with what came. Throws
  /// `Error{invalid_argument}` for tensors that do not fit, `Error{invalid_usage}` for a whole
  /// operation while a receive half waits or a third send half; then nothing has happened.
  /// `Error{mismatch}` (ranks' calls do not belong together; found at once by ranks that take each
  /// other's rows, else two operations later), `Error{timeout}` and `Error{peer_lost}` end the
  /// object: later calls throw `Error{failed_earlier}`. Of work on a stream they come from
  /// Stream::synchronize() (CPU), or the next call and status() (CUDA).
  DispatchResult dispatch(const DispatchRequest& request);
  /// Brings the experts' rows home and sums them. Throws like dispatch(), and
  /// `Error{invalid_usage}` for a handle that is empty or another object's, before its dispatch has
  /// its receive half, and for weights that dispatch had.
  CombineResult combine(const CombineRequest& request);
  /// Gives the lane the receive half of the dispatch that made `handle`, or, when it has that, of
  /// the oldest of its combines that have sent only; on a stream, which may be capturing, or, with
  /// none, now. Outputs are filled after it alone. Throws what the whole operation would, and
  /// `Error{invalid_usage}` out of the order of a lane, or if no half of the handle is open.
  void receive(const Handle& handle, const Stream& stream = {});
  /// What has been noticed so far. Waits for no operation: of work that is queued, it may not know
  /// yet.
  Status status() const;

 private:
  struct Impl;
  explicit LowLatency(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace expertwire
