#pragma once

#include <cstddef>
#include <initializer_list>
#include <memory>
#include <vector>

#include "expertwire/allocator.hpp"
#include "expertwire/communicator.hpp"
#include "expertwire/tensor.hpp"

namespace expertwire::reference {

/// The memory that a communicator's tensors lie in: host memory, or a CUDA device's.
class Space {
 public:
  Space() = default;
  Space(const Space&) = delete;
  Space& operator=(const Space&) = delete;
  virtual ~Space() = default;

  /// Memory until the space ends; every byte is 0x7B, so that what nobody wrote shows.
  virtual void* make_poisoned(std::size_t bytes) = 0;
  /// Between a host pointer and one of this space; done when the call returns.
  virtual void copy(void* to, const void* from, std::size_t bytes) = 0;
};

/// The space of a communicator's backend.
std::unique_ptr<Space> make_space(const Communicator& communicator);
/// In builds with CUDA alone.
std::unique_ptr<Space> make_cuda_space(int device);

/// Tensors of one space, and their likeness on the host.
class Tensors {
 public:
  explicit Tensors(const Communicator& communicator) : space_(make_space(communicator)) {}

  /// A poisoned tensor.
  TensorView make(DType dtype, std::initializer_list<std::int64_t> shape);
  /// A copy of a host tensor; absent stays absent.
  ConstTensorView upload(const ConstTensorView& host);
  /// A copy on the host; absent stays absent.
  TensorView download(const ConstTensorView& tensor);
  /// Copies a downloaded tensor back to where it came from.
  void write_back(const TensorView& tensor, const ConstTensorView& host);
  Allocator allocator();

 private:
  std::unique_ptr<Space> space_;
  std::vector<std::unique_ptr<std::vector<std::byte>>> host_;
};

}  // namespace expertwire::reference
