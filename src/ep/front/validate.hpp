#pragma once

#include <initializer_list>
#include <string>

#include "ep/protocol/row_format.hpp"
#include "expertwire/communicator.hpp"
#include "expertwire/shape.hpp"
#include "expertwire/stream.hpp"
#include "expertwire/tensor.hpp"

namespace expertwire::inline v0::ep {

/// Checks of arguments, done before anything is sent. All throw `Error{invalid_argument}` that
/// names the argument, its value and what is allowed.

inline constexpr int kMostTokens = 1 << 24;  ///< of a rank

void check_expert_count(int experts, int ranks);
void check_shape(const MoeShape& shape, int ranks);
void check_lanes(int lanes);
/// A stream, or none, of the communicator's backend.
void check_stream(const Communicator& communicator, const Stream& stream);
/// [T, K], int32 or int64.
void check_topk_idx(const ConstTensorView& topk_idx);
/// What a dispatch is about: the most that its object was made for, and the sizes of this call,
/// which checks fill in.
struct Geometry {
  const MoeShape& most;
  int ranks;
  MoeShape call;

  Geometry(const MoeShape& capacity, int size) : most(capacity), ranks(size), call(capacity) {}
};
/// The rows of a dispatch. Takes their H and, if it is a row type, their dtype.
/// Returns what will travel.
struct RowsIn {
  ConstTensorView x, x_scales;
  bool cast_to_fp8 = false;
};
RowFormat check_rows_in(Geometry& geometry, const RowsIn& rows);
/// E of a call; 0: the most.
void check_experts(Geometry& geometry, int experts);
/// M of a call; 0: the most.
void check_max_tokens(Geometry& geometry, int max_tokens);
/// The routing of `tokens` tokens, at most the M of the call. Takes K.
void check_routing(Geometry& geometry, std::int64_t tokens, const ConstTensorView& topk_idx,
                   const ConstTensorView& topk_weights);
/// Rows that combine takes: of any row type, as long as they are no larger than the object's.
/// Returns their dtype.
DType check_rows_home(const MoeShape& most, const ConstTensorView& y,
                      std::initializer_list<std::int64_t> shape);
/// A tensor that must have exactly this dtype and shape; -1 accepts any size.
void check_tensor(const char* name, const ConstTensorView& tensor, DType dtype,
                  std::initializer_list<std::int64_t> shape);
/// What belongs to each row of an output: one value a selection of its token, [N, K]; or, where
/// rows are grouped by expert, one, [N].
struct PerRow {
  std::int64_t rows, top_k;
  bool grouped;
};
void check_per_row(const char* name, const ConstTensorView& tensor, DType dtype,
                   const PerRow& wanted);
/// The same for rows of H elements, which must also be aligned to 16 bytes.
void check_rows(const char* name, const ConstTensorView& tensor, DType dtype,
                std::initializer_list<std::int64_t> shape);

/// Where tensors lie. Outputs are written while inputs are still read, here and for other ranks, so
/// their memory must be apart from that of the inputs and of each other. All lie where the
/// communicator's backend works: on its device, or on the host. What a view says of that is
/// believed; of one that says nothing, the CUDA backend asks the driver. Absent and empty tensors
/// do not count.
struct NamedTensor {
  const char* name;
  ConstTensorView tensor;
};
void check_memory(const Communicator& communicator, std::initializer_list<NamedTensor> outputs,
                  std::initializer_list<NamedTensor> inputs);

/// An output for scales: given for fp8 rows, and for no others.
void check_scales_out(const ConstTensorView& scales, const RowFormat& format,
                      std::initializer_list<std::int64_t> shape);

}  // namespace expertwire::ep
