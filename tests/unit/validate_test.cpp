#include "ep/front/validate.hpp"

#include <gtest/gtest.h>

#include <string>

#include "expertwire/error.hpp"

namespace expertwire::ep {
namespace {

template <class Call>
std::string message_of(Call call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
    return error.what();
  }
  return "no error";
}

void expect_names(const std::string& message, std::initializer_list<const char*> words) {
  for (const char* word : words) EXPECT_NE(message.find(word), std::string::npos) << message;
}

TEST(Validate, EveryMessageNamesArgumentValueAndWhatIsAllowed) {
  const MoeShape good{64, 8, 4, 16, DType::bf16};
  check_shape(good, 4);
  auto shape_with = [&](auto change) {
    MoeShape shape = good;
    change(shape);
    return message_of([&] { check_shape(shape, 4); });
  };
  expect_names(shape_with([](MoeShape& s) { s.experts = 10; }), {"experts is 10", "multiple"});
  expect_names(shape_with([](MoeShape& s) { s.hidden = 60; }), {"hidden is 60", "16 bytes"});
  expect_names(shape_with([](MoeShape& s) { s.hidden = 0; }), {"hidden is 0"});
  expect_names(shape_with([](MoeShape& s) { s.top_k = 33; }), {"top_k is 33", "from 1 to 32"});
  expect_names(shape_with([](MoeShape& s) { s.max_tokens = 0; }), {"max_tokens is 0"});
  expect_names(shape_with([](MoeShape& s) { s.dtype = DType::int32; }),
               {"int32", "bf16, fp16 or fp32"});
  expect_names(message_of([] { check_lanes(0); }), {"lanes is 0", "from 1 to 8"});

  alignas(16) char data[4096] = {};
  auto inputs = [&](ConstTensorView x, ConstTensorView ids, ConstTensorView weights) {
    return message_of([&] {
      Geometry geometry(good, 2);
      check_rows_in(geometry, {x, {}, false});
      check_routing(geometry, x.size(0), ids, weights);
    });
  };
  const ConstTensorView x(data, DType::bf16, {2, 64}), ids(data, DType::int32, {2, 4});
  EXPECT_EQ(inputs(x, ids, {}), "no error");
  expect_names(inputs({}, ids, {}), {"x is absent", "[T, H]"});
  expect_names(inputs({data, DType::fp32, {2, 64}}, ids, {}),
               {"x is fp32 [2, 64]", "rows of 256 bytes", "at most 128"});
  expect_names(inputs({data + 2, DType::bf16, {2, 64}}, ids, {}), {"aligned to 16"});
  expect_names(inputs({data, DType::bf16, {17, 64}}, ids, {}), {"17 tokens", "max_tokens = 16"});
  expect_names(inputs(x, {data, DType::fp32, {2, 4}}, {}), {"topk_idx is fp32", "int32 or int64"});
  EXPECT_EQ(inputs(x, {data, DType::int32, {2, 3}}, {}), "no error");
  expect_names(inputs(x, {data, DType::int32, {2, 5}}, {}), {"[2, 5]", "shape.top_k = 4"});
  expect_names(inputs(x, {data, DType::int32, {3, 4}}, {}), {"topk_idx", "[2, 4]"});
  expect_names(inputs(x, ids, {data, DType::bf16, {2, 4}}), {"topk_weights", "fp32 [2, 4]"});
  expect_names(inputs({nullptr, DType::bf16, {2, 64}}, ids, {}), {"x has no data"});
}

TEST(Validate, RowsAreOfTheShapesTypeOrFp8WithScales) {
  const MoeShape good{208, 8, 4, 16, DType::bf16};
  alignas(16) char data[8192] = {};
  const ConstTensorView x(data, DType::bf16, {2, 208}), fp8(data, DType::fp8_e4m3, {2, 208}),
      scales(data, DType::fp32, {2, 2});
  auto taken = [&](const RowsIn& in) {
    Geometry geometry(good, 2);
    return check_rows_in(geometry, in);
  };
  auto rows = [&](const RowsIn& in) { return message_of([&] { taken(in); }); };
  EXPECT_EQ(rows({x, {}, true}), "no error");
  EXPECT_EQ(rows({fp8, scales, false}), "no error");
  EXPECT_EQ(taken({x, {}, false}).data_bytes, 416U);
  EXPECT_EQ(taken({x, {}, false}).scales, 0U);
  EXPECT_EQ(taken({x, {}, true}).data_bytes, 208U);
  EXPECT_EQ(taken({fp8, scales, false}).scales, 2U);
  expect_names(rows({fp8, {}, false}), {"x_scales is absent", "fp32 [2, 2]"});
  expect_names(rows({fp8, {data, DType::fp32, {2, 1}}, false}), {"x_scales", "[2, 2]"});
  expect_names(rows({fp8, scales, true}), {"cast_to_fp8", "already"});
  expect_names(rows({x, scales, false}), {"x_scales are given", "bf16"});
  expect_names(rows({{data, DType::bf16, {2, 72}}, {}, true}), {"[2, 72]", "multiple of 16"});
  expect_names(rows({{data, DType::bf16, {2, 76}}, {}, false}), {"152 bytes", "multiple of 16"});
}

/// A call has its own sizes, within those of the object.
TEST(Validate, CallsHaveTheirOwnSizes) {
  const MoeShape most{208, 8, 4, 16, DType::bf16};
  alignas(16) char data[8192] = {};
  Geometry geometry(most, 2);
  check_rows_in(geometry, {{data, DType::fp32, {2, 100}}, {}, false});
  check_experts(geometry, 6);
  check_max_tokens(geometry, 5);
  check_routing(geometry, 2, {data, DType::int32, {2, 3}}, {});
  EXPECT_EQ(geometry.call.hidden, 100);
  EXPECT_EQ(geometry.call.dtype, DType::fp32);
  EXPECT_EQ(geometry.call.experts, 6);
  EXPECT_EQ(geometry.call.max_tokens, 5);
  EXPECT_EQ(geometry.call.top_k, 3);
  expect_names(message_of([&] { check_experts(geometry, 10); }), {"experts is 10", "at most"});
  expect_names(message_of([&] { check_experts(geometry, 7); }), {"experts is 7", "multiple"});
  expect_names(message_of([&] { check_max_tokens(geometry, 17); }), {"max_tokens is 17", "16"});
}

TEST(Validate, NamesTheNearestNumberOfRanks) {
  expect_names(message_of([] { check_expert_count(60, 8); }), {"is 6)"});
  expect_names(message_of([] { check_expert_count(40, 32); }), {"is 40)"});
}

}  // namespace
}  // namespace expertwire::ep
