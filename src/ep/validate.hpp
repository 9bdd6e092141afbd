#pragma once

#include <initializer_list>
#include <string>

#include "expertwire/communicator.hpp"
#include "expertwire/shape.hpp"
#include "expertwire/stream.hpp"
#include "expertwire/tensor.hpp"

namespace expertwire::ep {

/// Checks of arguments, done before anything is sent. All throw `Error{invalid_argument}` that
/// names the argument, its value and what is allowed.

void check_expert_count(int experts, int ranks);
void check_shape(const MoeShape& shape, int ranks);
void check_lanes(int lanes);
/// A stream, or none, of the communicator's backend.
void check_stream(const Communicator& communicator, const Stream* stream);
/// [T, K], int32 or int64.
void check_topk_idx(const ConstTensorView& topk_idx);
/// The tensors of a dispatch: T from `x`, at most M.
void check_dispatch_inputs(const MoeShape& shape, const ConstTensorView& x,
                           const ConstTensorView& topk_idx, const ConstTensorView& topk_weights);
/// A tensor that must have exactly this dtype and shape; -1 accepts any size.
void check_tensor(const char* name, const ConstTensorView& tensor, DType dtype,
                  std::initializer_list<std::int64_t> shape);
/// The same for rows of H elements, which must also be aligned to 16 bytes.
void check_rows(const char* name, const ConstTensorView& tensor, DType dtype,
                std::initializer_list<std::int64_t> shape);

}  // namespace expertwire::ep
