#include "reference/space.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace expertwire::reference {

namespace {

class HostSpace final : public Space {
 public:
  void* make_poisoned(std::size_t bytes) override {
    Allocation allocation = allocate_host(bytes);
    std::memset(allocation.data, 0x7B, bytes);
    owners_.push_back(allocation.owner);
    return allocation.data;
  }
  void copy(void* to, const void* from, std::size_t bytes) override {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }

 private:
  std::vector<std::shared_ptr<void>> owners_;
};

/// The same shape at another place.
template <class View, class Pointer>
View moved(Pointer data, const ConstTensorView& like) {
  switch (like.dimensions()) {
    case 1:
      return {data, like.dtype(), {like.size(0)}};
    case 2:
      return {data, like.dtype(), {like.size(0), like.size(1)}};
    case 3:
      return {data, like.dtype(), {like.size(0), like.size(1), like.size(2)}};
    default:
      throw std::logic_error("a tensor of the tests has 1 to 3 dimensions");
  }
}

}  // namespace

#if !defined(EXPERTWIRE_HAVE_CUDA)
std::unique_ptr<Space> make_cuda_space(int) { throw std::logic_error("this build has no CUDA"); }
#endif

std::unique_ptr<Space> make_space(const Communicator& communicator) {
  if (communicator.cuda_device() >= 0) return make_cuda_space(communicator.cuda_device());
  return std::make_unique<HostSpace>();
}

TensorView Tensors::make(DType dtype, std::initializer_list<std::int64_t> shape) {
  const std::size_t bytes = TensorView(nullptr, dtype, shape).bytes();
  return {space_->make_poisoned(std::max<std::size_t>(bytes, 16)), dtype, shape};
}

ConstTensorView Tensors::upload(const ConstTensorView& host) {
  if (!host.present()) return host;
  void* data = space_->make_poisoned(std::max<std::size_t>(host.bytes(), 16));
  space_->copy(data, host.data(), host.bytes());
  return moved<ConstTensorView, const void*>(data, host);
}

TensorView Tensors::download(const ConstTensorView& tensor) {
  if (!tensor.present()) return {};
  host_.push_back(
      std::make_unique<std::vector<std::byte>>(std::max<std::size_t>(tensor.bytes(), 16)));
  std::byte* data = host_.back()->data();
  space_->copy(data, tensor.data(), tensor.bytes());
  return moved<TensorView, void*>(data, tensor);
}

void Tensors::write_back(const TensorView& tensor, const ConstTensorView& host) {
  space_->copy(tensor.data(), host.data(), host.bytes());
}

Allocator Tensors::allocator() {
  return {[](void* self, const AllocationRequest& request) {
            const auto bytes = static_cast<std::int64_t>(request.like.bytes());
            auto& tensors = *static_cast<Tensors*>(self);
            return Allocation{tensors.make(DType::uint8, {bytes}).data(), nullptr};
          },
          this};
}

}  // namespace expertwire::reference
