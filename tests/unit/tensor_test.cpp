#include "expertwire/tensor.hpp"

#include <gtest/gtest.h>

#include "expertwire/allocator.hpp"
#include "expertwire/deadline.hpp"

namespace expertwire {
namespace {

TEST(Tensor, KnowsItsSize) {
  float data[6] = {};
  const TensorView view(data, DType::fp32, {2, 3});
  EXPECT_TRUE(view.present());
  EXPECT_EQ(view.elements(), 6);
  EXPECT_EQ(view.bytes(), 24U);
  EXPECT_EQ(describe(view), "fp32 [2, 3]");
  const ConstTensorView reading = view;
  EXPECT_EQ(reading.as<float>(), data);
}

TEST(Tensor, AbsentAndEmptyDiffer) {
  EXPECT_FALSE(TensorView().present());
  EXPECT_EQ(describe(TensorView()), "absent");
  EXPECT_EQ(TensorView().elements(), 0);
  const TensorView empty(nullptr, DType::bf16, {0, 7168});
  EXPECT_TRUE(empty.present());
  EXPECT_EQ(empty.bytes(), 0U);
}

TEST(Tensor, HasStridesAndADevice) {
  float data[32] = {};
  const TensorView view(data, DType::fp32, {2, 3});
  EXPECT_TRUE(view.contiguous());
  EXPECT_EQ(view.stride(0), 3);
  EXPECT_EQ(view.device(), kUnknownDevice);
  const ConstTensorView padded = view.strided({4, 1}).on(1);
  EXPECT_FALSE(padded.contiguous());
  EXPECT_EQ(padded.stride(0), 4);
  EXPECT_EQ(padded.device(), 1);
  EXPECT_EQ(padded.bytes(), 24U);
  EXPECT_EQ(describe(padded), "fp32 [2, 3] with strides [4, 1]");
  EXPECT_EQ(describe(view.strided({3, 1})), "fp32 [2, 3]");
  // What is never stepped over does not matter.
  EXPECT_TRUE(TensorView(data, DType::fp32, {1, 3}).strided({99, 1}).contiguous());
  EXPECT_THROW(view.strided({1}), Error);
}

TEST(Allocator, CallsWhatItIsGiven) {
  int calls = 0;
  const auto give = [&](const AllocationRequest& request) {
    ++calls;
    EXPECT_EQ(request.name, "x");
    return allocate_host(request.like.bytes());
  };
  const Allocator allocator = Allocator::of(give);
  EXPECT_TRUE(allocator);
  EXPECT_FALSE(Allocator());
  const TensorView like(nullptr, DType::bf16, {4, 8});
  EXPECT_NE(allocator({"x", like}).data, nullptr);
  EXPECT_EQ(calls, 1);
}

TEST(Allocator, HostMemoryIsAlignedAndOwned) {
  const Allocation allocation = allocate_host(40);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(allocation.data) % 64, 0U);
  EXPECT_NE(allocation.owner, nullptr);
  EXPECT_EQ(allocate_host(0).data, nullptr);
}

TEST(Tensor, RefusesImpossibleShapes) {
  EXPECT_THROW(TensorView(nullptr, DType::fp32, {1, 2, 3, 4, 5}), Error);
  EXPECT_THROW(TensorView(nullptr, DType::fp32, {2, -1}), Error);
}

TEST(Deadline, HugeBudgetsDoNotWrap) {
  EXPECT_FALSE(Deadline::after(std::chrono::milliseconds::max()).expired());
  EXPECT_TRUE(Deadline::after(std::chrono::milliseconds(0)).expired());
}

}  // namespace
}  // namespace expertwire
