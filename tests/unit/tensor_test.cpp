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

TEST(Allocator, HostMemoryIsAlignedAndOwned) {
  const Allocation allocation = allocate_host({"x", DType::fp32, {10}, 40});
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(allocation.data) % 64, 0U);
  EXPECT_NE(allocation.owner, nullptr);
  EXPECT_EQ(allocate_host({"x", DType::fp32, {0}, 0}).data, nullptr);
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
