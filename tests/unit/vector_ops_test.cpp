#include "ep/cpu/vector_ops.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "reference/oracle.hpp"
#include "reference/random.hpp"

namespace expertwire::ep::cpu {
namespace {

std::vector<const VectorOps*> all_versions() {
  std::vector<const VectorOps*> versions;
  for (const VectorOps* ops : {generic_ops(), avx2_ops(), avx512_ops()})
    if (ops != nullptr) versions.push_back(ops);
  return versions;
}

std::vector<std::byte> random_row(DType dtype, std::size_t elements, reference::Random& random) {
  reference::Row row(elements);
  for (float& value : row) value = static_cast<float>(random.uniform() * 8 - 4);
  std::vector<std::byte> bytes(elements * size_of(dtype));
  reference::encode(dtype, row, bytes.data());
  return bytes;
}

TEST(VectorOps, SumIsTheStatedFormulaToTheBit) {
  reference::Random random{1};
  for (const VectorOps* ops : all_versions())
    for (DType dtype : {DType::bf16, DType::fp16, DType::fp32})
      for (std::size_t elements : {8U, 16U, 24U, 40U, 96U, 200U, 2688U})
        for (int count : {0, 1, 2, 5, 32})
          for (int form = 0; form < 8; ++form) {
            std::vector<std::vector<std::byte>> rows;
            std::vector<const void*> pointers;
            std::vector<float> weights;
            for (int i = 0; i < count; ++i) {
              rows.push_back(random_row(dtype, elements, random));
              weights.push_back(static_cast<float>(random.uniform()));
            }
            for (const auto& row : rows) pointers.push_back(row.data());
            const auto init = random_row(dtype, elements, random);
            // Room beyond the row shows whether anything is written there.
            std::vector<std::byte> got(elements * size_of(dtype) + 64, std::byte{0x5A});
            SumRequest request;
            request.dtype = dtype;
            request.elements = elements;
            request.rows = pointers.data();
            request.count = count;
            request.weights = (form & 1) != 0 ? weights.data() : nullptr;
            request.init = (form & 2) != 0 ? init.data() : nullptr;
            request.out = got.data();
            request.stream = (form & 4) != 0;
            ops->sum(request);
            ops->store_fence();

            reference::Row want = (form & 2) != 0 ? reference::decode(dtype, init.data(), elements)
                                                  : reference::Row(elements, 0.0F);
            for (std::size_t i = 0; i < rows.size(); ++i) {
              const reference::Row row = reference::decode(dtype, rows[i].data(), elements);
              for (std::size_t h = 0; h < elements; ++h)
                want[h] = std::fma((form & 1) != 0 ? weights[i] : 1.0F, row[h], want[h]);
            }
            std::vector<std::byte> bytes(elements * size_of(dtype));
            reference::encode(dtype, want, bytes.data());
            ASSERT_EQ(std::memcmp(got.data(), bytes.data(), bytes.size()), 0)
                << ops->name << " " << to_string(dtype) << " " << elements << " x " << count
                << " form " << form;
            for (std::size_t i = bytes.size(); i < got.size(); ++i)
              ASSERT_EQ(got[i], std::byte{0x5A}) << ops->name;
          }
}

/// What a sum of one row of ones, with `value` as its weight, rounds to: rows alone cannot make
/// every fp32 value.
std::uint16_t rounded(const VectorOps& ops, DType dtype, float value) {
  std::vector<std::byte> one(16 * size_of(dtype));
  reference::encode(dtype, reference::Row(16, 1.0F), one.data());
  std::vector<std::uint16_t> out(16);
  const void* pointer = one.data();
  SumRequest request;
  request.dtype = dtype;
  request.elements = 16;
  request.rows = &pointer;
  request.weights = &value;
  request.count = 1;
  request.out = out.data();
  ops.sum(request);
  return out[7];
}

TEST(VectorOps, RoundsTiesToEvenAndKeepsSpecialValues) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  // Ties, values just above and below them, the largest finite value, infinities and NaN.
  const std::vector<std::pair<std::uint32_t, std::uint16_t>> bf16 = {
      {0x3F808000, 0x3F80}, {0x3F818000, 0x3F82}, {0x3F808001, 0x3F81}, {0x3F807FFF, 0x3F80},
      {0x7F7FFFFF, 0x7F80}, {0xBF818000, 0xBF82}, {0x00000000, 0x0000}};
  // 65504 is the largest, 65520 the tie above it; 2^-24 the smallest, half of it a tie with 0.
  const std::vector<std::pair<std::uint32_t, std::uint16_t>> fp16 = {
      {0x3F801000, 0x3C00}, {0x3F803000, 0x3C02}, {0x3F801001, 0x3C01}, {0x477FE000, 0x7BFF},
      {0x477FEFFF, 0x7BFF}, {0x477FF000, 0x7C00}, {0x47800000, 0x7C00}, {0xC77FF000, 0xFC00},
      {0x33800000, 0x0001}, {0x33000000, 0x0000}, {0x33000001, 0x0001}, {0x387FC000, 0x03FF},
      {0x387FE000, 0x0400}, {0x38800000, 0x0400}, {0xB3C00000, 0x8002}, {0x00000001, 0x0000}};
  for (const VectorOps* ops : all_versions())
    for (DType dtype : {DType::bf16, DType::fp16}) {
      const bool half = dtype == DType::fp16;
      for (const auto& [bits, want] : half ? fp16 : bf16) {
        float value = 0;
        std::memcpy(&value, &bits, sizeof(value));
        EXPECT_EQ(rounded(*ops, dtype, value), want) << ops->name << std::hex << " " << bits;
      }
      EXPECT_EQ(rounded(*ops, dtype, kInfinity), half ? 0x7C00 : 0x7F80) << ops->name;
      EXPECT_EQ(rounded(*ops, dtype, -kInfinity), half ? 0xFC00 : 0xFF80) << ops->name;
      EXPECT_EQ(rounded(*ops, dtype, std::nanf("")), 0x7FFF) << ops->name;
    }
}

/// Every fp16 code comes through a sum as it is, but for what is no number.
TEST(VectorOps, EveryFp16CodeIsItself) {
  std::vector<std::uint16_t> codes(1U << 16), out(codes.size());
  for (std::size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<std::uint16_t>(i);
  for (const VectorOps* ops : all_versions()) {
    SumRequest request;
    request.dtype = DType::fp16;
    request.elements = codes.size();
    request.init = codes.data();
    request.out = out.data();
    ops->sum(request);
    for (std::size_t i = 0; i < codes.size(); ++i) {
      const bool number = (i & 0x7FFF) <= 0x7C00;
      ASSERT_EQ(out[i], number ? codes[i] : 0x7FFF) << ops->name << " " << i;
    }
  }
}

TEST(VectorOps, CastIsTheNearestFp8OfEveryValue) {
  reference::Random random{3};
  for (const VectorOps* ops : all_versions())
    for (DType dtype : {DType::bf16, DType::fp16, DType::fp32})
      for (std::size_t elements : {16U, 128U, 208U, 2880U})
        for (int round = 0; round < 20; ++round) {
          // Sizes from far below the smallest scale to large ones, ties, zeros, infinities and NaN.
          reference::Row row(elements);
          for (float& value : row) {
            value = static_cast<float>((random.uniform() - 0.5) *
                                       std::ldexp(1.0, random.below(40) - 30));
            if (random.chance(0.1)) value = static_cast<float>(random.below(33) - 16) / 16.0F;
            if (round >= 18 && random.chance(0.02))
              value = random.chance(0.5) ? std::nanf("") : -std::numeric_limits<float>::infinity();
          }
          std::vector<std::byte> x(elements * size_of(dtype));
          reference::encode(dtype, row, x.data());
          row = reference::decode(dtype, x.data(), elements);
          const reference::Fp8Row want = reference::to_fp8(row);
          std::vector<std::byte> got(elements + 16, std::byte{0x5A});
          std::vector<float> scales(want.scales.size() + 1, -1.0F);
          ops->cast({dtype, elements, x.data(), got.data(), scales.data()});
          for (std::size_t h = 0; h < elements; ++h)
            ASSERT_EQ(got[h], want.data[h])
                << ops->name << " " << to_string(dtype) << " [" << h << "] = " << row[h];
          for (std::size_t i = 0; i < want.scales.size(); ++i)
            ASSERT_EQ(scales[i], want.scales[i]) << ops->name;
          ASSERT_EQ(got[elements], std::byte{0x5A});
          ASSERT_EQ(scales.back(), -1.0F);
        }
}

TEST(VectorOps, EveryFp8CodeIsItself) {
  for (const VectorOps* ops : all_versions()) {
    // 448 makes the scale 1.
    reference::Row row;
    for (int code = 0; code < 256; ++code) {
      row.resize(static_cast<std::size_t>(code) * 128, 448.0F);
      row.push_back((code & 0x7F) == 0x7F ? std::nanf("")
                                          : reference::e4m3_value(static_cast<std::uint8_t>(code)));
    }
    row.resize(256 * 128, 448.0F);
    std::vector<std::uint8_t> got(row.size());
    std::vector<float> scales(256);
    ops->cast({DType::fp32, row.size(), row.data(), got.data(), scales.data()});
    for (std::size_t code = 0; code < 256; ++code)
      EXPECT_EQ(got[code * 128], code == 0xFF ? 0x7F : code) << ops->name;
  }
}

TEST(VectorOps, CopiesToEveryPlaceAndNowhereElse) {
  reference::Random random{2};
  for (const VectorOps* ops : all_versions())
    for (std::size_t bytes : {16U, 48U, 64U, 80U, 5376U, 14336U})
      for (std::size_t shift : {0U, 16U})
        for (bool stream : {false, true}) {
          std::vector<std::byte> from(bytes);
          for (std::byte& b : from) b = static_cast<std::byte>(random.next());
          std::vector<std::vector<std::byte>> places(3, std::vector<std::byte>(bytes + 256));
          std::vector<void*> pointers;
          for (auto& place : places) {
            const auto base = reinterpret_cast<std::uintptr_t>(place.data());
            pointers.push_back(place.data() + (128 - base % 64) + shift);
          }
          ops->copy(pointers.data(), 3, from.data(), bytes, stream);
          ops->store_fence();
          for (std::size_t i = 0; i < places.size(); ++i) {
            auto* start = static_cast<std::byte*>(pointers[i]);
            ASSERT_EQ(std::memcmp(start, from.data(), bytes), 0) << ops->name;
            for (std::byte* b = places[i].data(); b < start; ++b) ASSERT_EQ(*b, std::byte{0});
            for (std::byte* b = start + bytes; b < places[i].data() + places[i].size(); ++b)
              ASSERT_EQ(*b, std::byte{0});
          }
        }
}

}  // namespace
}  // namespace expertwire::ep::cpu
