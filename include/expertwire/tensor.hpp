#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "expertwire/dtype.hpp"
#include "expertwire/error.hpp"

namespace expertwire {

/// A view of contiguous, row-major memory that somebody else owns. It never copies and never frees.
///
/// A default-made view is *absent*: `present()` is false. A view of zero elements may be present
/// with a null pointer (a rank with no tokens).
template <class Pointer>
class BasicTensorView {
 public:
  static constexpr int kMaxDimensions = 4;

  BasicTensorView() = default;
  /// Throws `Error{invalid_argument}` for more than 4 dimensions or a negative size.
  BasicTensorView(Pointer data, DType dtype, std::initializer_list<std::int64_t> shape)
      : data_(data), dtype_(dtype), dimensions_(static_cast<int>(shape.size())) {
    if (shape.size() > kMaxDimensions)
      throw Error(ErrorCode::invalid_argument, "a tensor has more than 4 dimensions");
    int i = 0;
    for (std::int64_t size : shape) {
      if (size < 0)
        throw Error(ErrorCode::invalid_argument, "size " + std::to_string(i) + " of a tensor is " +
                                                     std::to_string(size) +
                                                     "; it must not be negative");
      shape_[static_cast<std::size_t>(i++)] = size;
    }
  }
  /// A view that may be written converts to one that may only be read.
  template <class Other, class = std::enable_if_t<std::is_convertible_v<Other, Pointer>>>
  BasicTensorView(const BasicTensorView<Other>& other)  // NOLINT(google-explicit-constructor)
      : data_(other.data()), dtype_(other.dtype()), dimensions_(other.dimensions()) {
    for (int i = 0; i < dimensions_; ++i) shape_[static_cast<std::size_t>(i)] = other.size(i);
  }

  bool present() const noexcept { return dimensions_ != 0; }
  Pointer data() const noexcept { return data_; }
  DType dtype() const noexcept { return dtype_; }
  int dimensions() const noexcept { return dimensions_; }
  std::int64_t size(int dimension) const noexcept {
    return shape_[static_cast<std::size_t>(dimension)];
  }
  /// Number of elements.
  std::int64_t elements() const noexcept {
    std::int64_t n = present() ? 1 : 0;
    for (int i = 0; i < dimensions_; ++i) n *= size(i);
    return n;
  }
  /// Number of bytes.
  std::size_t bytes() const noexcept {
    return static_cast<std::size_t>(elements()) * size_of(dtype_);
  }
  template <class T>
  auto as() const noexcept {
    using Target = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const T, T>;
    return static_cast<Target*>(data_);
  }

 private:
  Pointer data_ = nullptr;
  DType dtype_ = DType::uint8;
  int dimensions_ = 0;
  std::array<std::int64_t, kMaxDimensions> shape_{};
};

using TensorView = BasicTensorView<void*>;
using ConstTensorView = BasicTensorView<const void*>;

/// "bf16 [128, 7168]", for messages.
std::string describe(const ConstTensorView& view);

}  // namespace expertwire
