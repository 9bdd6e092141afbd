#include "expertwire/tensor.hpp"

#include <fmt/format.h>

#include <new>

#include "expertwire/allocator.hpp"

namespace expertwire::inline v0 {

std::string describe(const ConstTensorView& view) {
  if (!view.present()) return "absent";
  std::string text = fmt::format("{} [", to_string(view.dtype()));
  for (int i = 0; i < view.dimensions(); ++i)
    text += fmt::format("{}{}", i == 0 ? "" : ", ", view.size(i));
  text += "]";
  if (view.contiguous()) return text;
  for (int i = 0; i < view.dimensions(); ++i)
    text += fmt::format("{}{}", i == 0 ? " with strides [" : ", ", view.stride(i));
  return text + "]";
}

Allocation allocate_host(std::size_t bytes) {
  constexpr std::align_val_t kAlignment{64};
  if (bytes == 0) return {};
  void* data = ::operator new(bytes, kAlignment);
  return {data, std::shared_ptr<void>(data, [](void* p) { ::operator delete(p, kAlignment); })};
}

}  // namespace expertwire
