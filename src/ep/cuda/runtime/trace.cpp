#include "ep/cuda/runtime/trace.hpp"

#include <algorithm>
#include <cstddef>

namespace expertwire::inline v0::ep::cuda {

namespace {

constexpr std::size_t kWords = static_cast<std::size_t>(kMarks) * kMostTracedBlocks;

thread_local Trace* current = nullptr;

/// The times of one mark in one launch.
std::vector<std::uint64_t> noted(const std::uint64_t* launch, int mark) {
  std::vector<std::uint64_t> times;
  for (int block = 0; block < kMostTracedBlocks; ++block)
    if (const std::uint64_t time = launch[mark * kMostTracedBlocks + block]; time != 0)
      times.push_back(time);
  return times;
}

double us(std::uint64_t ns) { return static_cast<double>(ns) / 1e3; }

OperationTimes summarize(const std::string& operation, const std::uint64_t* launches,
                         std::size_t count) {
  OperationTimes result;
  result.operation = operation;
  std::uint64_t start = UINT64_MAX, end = 0;
  for (std::size_t l = 0; l < count; ++l)
    for (int mark = 0; mark < kMarks; ++mark)
      for (std::uint64_t time : noted(launches + l * kWords, mark)) {
        start = std::min(start, time);
        end = std::max(end, time);
      }
  if (end == 0) return result;
  result.start_ns = start;
  result.end_ns = end;
  result.span_us = us(end - start);
  for (std::size_t l = 0; l < count; ++l) {
    auto& moments = result.kernels.emplace_back();
    for (int mark = 0; mark < kMarks; ++mark) {
      const auto times = noted(launches + l * kWords, mark);
      if (times.empty()) continue;
      double sum = 0;
      for (std::uint64_t time : times) sum += us(time - start);
      moments[static_cast<std::size_t>(mark)] = {
          us(*std::min_element(times.begin(), times.end()) - start),
          sum / static_cast<double>(times.size()),
          us(*std::max_element(times.begin(), times.end()) - start)};
    }
  }
  return result;
}

}  // namespace

Trace::Trace(int device, int launches) : tensors_(device), room_(launches) {
  const auto words = static_cast<std::int64_t>(kWords) * launches;
  memory_ = tensors_.make(DType::int64, {words}).as<std::uint64_t>();
  check_cuda(cudaMemsetAsync(memory_, 0, static_cast<std::size_t>(words) * sizeof(std::uint64_t),
                             tensors_.stream()),
             "cudaMemsetAsync");
  tensors_.synchronize();
  current = this;
}

Trace::~Trace() { current = nullptr; }

std::uint64_t* Trace::next(const char* operation) {
  if (current == nullptr || current->operations_.size() >= static_cast<std::size_t>(current->room_))
    return nullptr;
  current->operations_.emplace_back(operation);
  return current->memory_ + (current->operations_.size() - 1) * kWords;
}

std::vector<OperationTimes> Trace::read() {
  std::vector<std::uint64_t> words(operations_.size() * kWords);
  tensors_.copy(words.data(), memory_, words.size() * sizeof(std::uint64_t));
  check_cuda(cudaMemsetAsync(memory_, 0, words.size() * sizeof(std::uint64_t), tensors_.stream()),
             "cudaMemsetAsync");
  tensors_.synchronize();
  std::vector<OperationTimes> result;
  for (std::size_t first = 0; first < operations_.size();) {
    std::size_t end = first + 1;
    while (end < operations_.size() && operations_[end] == operations_[first]) ++end;
    result.push_back(summarize(operations_[first], words.data() + first * kWords, end - first));
    first = end;
  }
  return result;
}

}  // namespace expertwire::ep::cuda
