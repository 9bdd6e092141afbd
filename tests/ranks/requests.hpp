#pragma once

#include <gtest/gtest.h>

#include <string>

#include "ranks/thread_ranks.hpp"
#include "reference/space.hpp"

namespace expertwire::test {

inline const MoeShape kShape{64, 24, 4, 32, DType::bf16};

inline reference::Workload workload_for(int ranks, const MoeShape& shape = kShape) {
  return reference::Workload({shape, ranks, 21, reference::RoutingPattern::parse("uniform"), true});
}

/// An object with a pool for every row.
inline HighThroughputOptions with_pool(const MoeShape& shape, int lanes = 1, int threads = 0) {
  return {shape, lanes, HighThroughputOptions::kEveryRow, threads};
}

template <class Call>
void expect_error(ErrorCode code, const char* words, Call call) {
  try {
    call();
    ADD_FAILURE() << "no error: " << words;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
  }
}

/// A request over inputs that it keeps, in memory of the backend.
template <class Object>
struct Request {
  reference::RankInput input;
  reference::Tensors tensors;
  typename Object::DispatchRequest dispatch;

  Request(const Communicator& communicator, const reference::Workload& workload, int step)
      : input(workload.input(communicator.rank(), step)), tensors(communicator) {
    const MoeShape& shape = workload.spec().shape;
    dispatch.x = tensors.upload({input.x.data(), shape.dtype, {input.tokens, shape.hidden}});
    dispatch.topk_idx =
        tensors.upload({input.topk_idx.data(), DType::int64, {input.tokens, shape.top_k}});
    dispatch.topk_weights =
        tensors.upload({input.topk_weights.data(), DType::fp32, {input.tokens, shape.top_k}});
  }
};

}  // namespace expertwire::test
