#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "expertwire/dtype.hpp"
#include "expertwire/error.hpp"

namespace expertwire::inline v0 {

/// Where memory lies: a CUDA device by its number, the host, or not said.
inline constexpr int kHost = -1, kUnknownDevice = -2;

/// A view of memory that somebody else owns. It never copies and never frees. Row-major and
/// contiguous unless strides are given; then operations say which of them they take.
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
  /// The same memory with these strides, in elements, one a dimension. Throws
  /// `Error{invalid_argument}` for another number of them.
  BasicTensorView strided(std::initializer_list<std::int64_t> strides) const {
    if (static_cast<int>(strides.size()) != dimensions_)
      throw Error(ErrorCode::invalid_argument, std::to_string(strides.size()) +
                                                   " strides are given to a tensor of " +
                                                   std::to_string(dimensions_) + " dimensions");
    BasicTensorView result = *this;
    std::copy(strides.begin(), strides.end(), result.strides_.begin());
    result.strided_ = true;
    return result;
  }
  /// The same memory, said to lie on `device` (or kHost). It is believed; the CUDA backend looks up
  /// where memory lies of which nothing is said.
  BasicTensorView on(int device) const {
    BasicTensorView result = *this;
    result.device_ = device;
    return result;
  }
  /// A view that may be written converts to one that may only be read.
  template <class Other, class = std::enable_if_t<std::is_convertible_v<Other, Pointer>>>
  BasicTensorView(const BasicTensorView<Other>& other)  // NOLINT(google-explicit-constructor)
      : data_(other.data_),
        dtype_(other.dtype_),
        dimensions_(other.dimensions_),
        device_(other.device_),
        strided_(other.strided_),
        shape_(other.shape_),
        strides_(other.strides_) {}

  bool present() const noexcept { return dimensions_ != 0; }
  Pointer data() const noexcept { return data_; }
  DType dtype() const noexcept { return dtype_; }
  int dimensions() const noexcept { return dimensions_; }
  std::int64_t size(int dimension) const noexcept {
    return shape_[static_cast<std::size_t>(dimension)];
  }
  /// Elements from one index of a dimension to the next.
  std::int64_t stride(int dimension) const noexcept {
    if (strided_) return strides_[static_cast<std::size_t>(dimension)];
    std::int64_t n = 1;
    for (int i = dimension + 1; i < dimensions_; ++i) n *= size(i);
    return n;
  }
  /// Whether elements lie side by side in row-major order. Strides of dimensions of one element or
  /// none do not matter.
  bool contiguous() const noexcept {
    std::int64_t n = 1;
    for (int i = dimensions_ - 1; i >= 0; --i) {
      if (strided_ && size(i) > 1 && stride(i) != n) return false;
      n *= size(i);
    }
    return true;
  }
  /// A device, kHost or kUnknownDevice.
  int device() const noexcept { return device_; }
  /// Number of elements.
  std::int64_t elements() const noexcept {
    std::int64_t n = present() ? 1 : 0;
    for (int i = 0; i < dimensions_; ++i) n *= size(i);
    return n;
  }
  /// Number of bytes of the elements.
  std::size_t bytes() const noexcept {
    return static_cast<std::size_t>(elements()) * size_of(dtype_);
  }
  template <class T>
  auto as() const noexcept {
    using Target = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const T, T>;
    return static_cast<Target*>(data_);
  }

 private:
  template <class Other>
  friend class BasicTensorView;

  Pointer data_ = nullptr;
  DType dtype_ = DType::uint8;
  int dimensions_ = 0;
  int device_ = kUnknownDevice;
  bool strided_ = false;
  std::array<std::int64_t, kMaxDimensions> shape_{}, strides_{};
};

using TensorView = BasicTensorView<void*>;
using ConstTensorView = BasicTensorView<const void*>;

/// "bf16 [128, 7168]", for messages; with strides if it is not contiguous.
std::string describe(const ConstTensorView& view);

}  // namespace expertwire
