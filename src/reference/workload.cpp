#include "reference/workload.hpp"

#include "reference/oracle.hpp"

namespace expertwire::reference {

namespace {

constexpr std::uint64_t kTokensKey = 1, kIdsKey = 2, kWeightsKey = 3, kRowKey = 4, kBiasKey = 5;

std::uint64_t key(int value) { return static_cast<std::uint64_t>(value); }

}  // namespace

Workload::Workload(const WorkloadSpec& spec)
    : spec_(spec),
      pattern_shape_{spec.ranks, spec.shape.experts, spec.shape.top_k, spec.seed},
      popularity_(spec.routing.popularity(pattern_shape_)) {}

int Workload::tokens(int rank, int step) const {
  const int most = spec_.shape.max_tokens;
  if (!spec_.ragged) return most;
  Random random{spec_.seed, kTokensKey, key(rank), key(step)};
  return random.chance(0.25) ? 0 : random.below(most + 1);
}

std::vector<std::int64_t> Workload::topk_idx(int rank, int step) const {
  const int count = tokens(rank, step);
  Random random{spec_.seed, kIdsKey, key(rank), key(step)};
  std::vector<std::int64_t> all;
  all.reserve(static_cast<std::size_t>(count) * static_cast<std::size_t>(spec_.shape.top_k));
  for (int t = 0; t < count; ++t) {
    const std::int64_t of_job =
        (static_cast<std::int64_t>(step) * spec_.ranks + rank) * spec_.shape.max_tokens + t;
    std::vector<std::int64_t> row = spec_.routing.draw(pattern_shape_, popularity_, of_job, random);
    for (std::size_t k = 1; k < row.size(); ++k)
      if (random.chance(spec_.repeats)) row[k] = row[k - 1];
    all.insert(all.end(), row.begin(), row.end());
  }
  return all;
}

std::vector<float> Workload::topk_weights(int rank, int step) const {
  std::vector<float> weights(static_cast<std::size_t>(tokens(rank, step)) *
                             static_cast<std::size_t>(spec_.shape.top_k));
  Random random{spec_.seed, kWeightsKey, key(rank), key(step)};
  for (float& weight : weights) weight = static_cast<float>(random.uniform());
  return weights;
}

void Workload::fill_row(int rank, int step, int token, bool bias, std::byte* row) const {
  Random random{spec_.seed, bias ? kBiasKey : kRowKey, key(rank), key(step), key(token)};
  Row values(static_cast<std::size_t>(spec_.shape.hidden));
  for (std::size_t h = 0; h < values.size(); h += 4) {
    const std::uint64_t bits = random.next();
    for (std::size_t i = h; i < h + 4 && i < values.size(); ++i) {
      const auto piece = static_cast<std::int16_t>(bits >> (16 * (i - h)));
      values[i] = static_cast<float>(piece) / 8192.0F;
    }
  }
  encode(spec_.shape.dtype, values, row);
}

RankInput Workload::input(int rank, int step) const {
  RankInput input;
  input.tokens = tokens(rank, step);
  input.topk_idx = topk_idx(rank, step);
  input.topk_weights = topk_weights(rank, step);
  const std::size_t row = spec_.shape.row_bytes();
  input.x.resize(static_cast<std::size_t>(input.tokens) * row);
  input.bias.resize(input.x.size());
  for (int t = 0; t < input.tokens; ++t) {
    fill_row(rank, step, t, false, input.x.data() + static_cast<std::size_t>(t) * row);
    fill_row(rank, step, t, true, input.bias.data() + static_cast<std::size_t>(t) * row);
  }
  return input;
}

}  // namespace expertwire::reference
