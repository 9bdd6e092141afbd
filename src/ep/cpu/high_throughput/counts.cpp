#include <algorithm>

#include "base/check.hpp"
#include "ep/cpu/high_throughput/lane.hpp"

namespace expertwire::inline v0::ep::cpu {

HighThroughputLane::HighThroughputLane(Memory memory, const MoeShape& shape, int workers)
    : Lane(std::move(memory), shape, workers), places_(memory_.slots()) {
  const std::size_t chunks = index(memory_.size()) * memory_.slots().chunks();
  chunk_rows_ = std::make_unique<std::atomic<std::int32_t>[]>(chunks);
  first_epoch_ = memory_.direction(memory_.slots().dispatch).sending();
}

Epoch HighThroughputLane::epoch_after(std::uint64_t dispatches) const {
  return first_epoch_ + static_cast<Epoch>(dispatches);
}

void HighThroughputHandle::adopt(const HighThroughputHandle& cached, const WaitContext& context) {
  if (cached.counted.wait_for(context.deadline.remaining()) != std::future_status::ready)
    throw Error(ErrorCode::timeout,
                fmt::format("{} waited {} ms for the dispatch whose routing it takes",
                            context.operation, context.deadline.budget().count()),
                {context.communicator->rank(), -1, Phase::counts});
  cached.counted.get();
  route = cached.route;
  rows = cached.rows;
  capacity = cached.capacity;
  first_at = cached.first_at;
  first_from = cached.first_from;
  selections_per_expert = cached.selections_per_expert;
  root = cached.root;
  root_lane = cached.root_lane;
  came = cached.came;
  std::copy(cached.source_offsets.begin(), cached.source_offsets.end(), source_offsets.begin());
  first_in = cached.first_in;
  std::copy(cached.expert_offsets.begin(), cached.expert_offsets.end(), expert_offsets.begin());
  std::copy(cached.group_offsets.begin(), cached.group_offsets.end(), group_offsets.begin());
}

void HighThroughputHandle::place_groups(const std::vector<std::int32_t>& selections) {
  const auto local = static_cast<std::int32_t>(selections_per_expert.size());
  const std::size_t ranks = first_at.size();
  first_in.assign(selections.size(), 0);
  for (std::int32_t e = 0; e < local; ++e) {
    std::int64_t next = group_offsets[index(e)];
    for (std::size_t source = 0; source < ranks; ++source) {
      const std::size_t i = source * index(local) + index(e);
      first_in[i] = next;
      next += selections[i];
    }
    const std::int32_t count = selections_per_expert[index(e)];
    expert_offsets[index(e) + 1] = expert_offsets[index(e)] + count;
    group_offsets[index(e) + 1] =
        group_offsets[index(e)] + (count + alignment - 1) / alignment * alignment;
  }
}

// Counts ---------------------------------------------------------------------------------------

void HighThroughputLane::exchange_counts(HighThroughputHandle& handle, std::int64_t capacity,
                                         std::int32_t options, const WaitContext& context) {
  const auto& slots = memory_.slots();
  const Epoch n = memory_.direction(slots.dispatch).sending();
  const Route& route = handle.route;
  const int size = memory_.size(), local = route.placement.local_experts();
  const bool strict = (options & Call::kCapacity) == 0;
  const Call call = handle.call(options, handle.format);
  handle.root = n;
  handle.root_lane = handle.lane;
  for_each_peer(memory_.rank(), size, [&](int peer) {
    memory_.await_credit(slots.dispatch, peer, n, context);
    memory_.tell_call(slots.dispatch, peer, n, call, n);
    const std::uint64_t counts = slots.counts_of(n);
    memory_.tell(peer, counts, slots.kCapacity, {static_cast<std::int32_t>(capacity), n});
    for (int to = 0; to < size; ++to)
      memory_.tell(peer, counts, slots.kHeader + to, {route.rows_to_rank[index(to)], n});
    for (int e = 0; e < local; ++e)
      memory_.tell(peer, counts, slots.kHeader + size + e,
                   {route.rows_to_expert[index(peer * local + e)], n});
  });

  handle.rows.assign(index(size) * index(size), 0);
  handle.capacity.assign(index(size), 0);
  handle.first_at.assign(index(size), 0);
  handle.first_from.assign(index(size) + 1, 0);
  handle.selections_per_expert.assign(index(local), 0);
  std::vector<std::int32_t> selections;
  std::vector<std::int64_t> needed(index(size), 0);
  for (int source = 0; source < size; ++source) {
    const auto* counts = memory_.inbox<Tagged>(source, slots.counts_of(n));
    auto count = [&](int i) { return memory_.await_count(counts + i, source, n, context); };
    memory_.compare_call(slots.dispatch, source, n, context);
    handle.capacity[index(source)] = count(slots.kCapacity);
    for (int to = 0; to < size; ++to) {
      const std::int32_t rows = count(slots.kHeader + to);
      handle.rows[index(source) * index(size) + index(to)] = rows;
      if (source < memory_.rank()) handle.first_at[index(to)] += rows;
      needed[index(to)] += rows;
    }
    handle.first_from[index(source) + 1] =
        handle.first_from[index(source)] + handle.rows_between(source, memory_.rank());
    for (int e = 0; e < local; ++e) {
      selections.push_back(count(slots.kHeader + size + e));
      handle.selections_per_expert[index(e)] += selections.back();
    }
  }
  handle.came = static_cast<std::int32_t>(handle.first_from.back());
  std::transform(handle.first_from.begin(), handle.first_from.end(), handle.source_offsets.begin(),
                 [](std::int64_t first) { return static_cast<std::int32_t>(first); });
  if (handle.grouped) {
    handle.place_groups(selections);
    handle.came = handle.group_offsets.back();
  }
  for (int to = 0; strict && to < size; ++to)
    handle.too_many = handle.too_many || needed[index(to)] > handle.capacity[index(to)];
}

void HighThroughputLane::exchange_calls(const HighThroughputHandle& handle, std::int32_t options,
                                        const WaitContext& context) const {
  const DirectionSlots& place = memory_.slots().dispatch;
  const Epoch n = memory_.direction(place).sending();
  Call call = handle.call(options, handle.format);
  call.lane = handle.root_lane;
  for_each_peer(memory_.rank(), memory_.size(), [&](int peer) {
    memory_.await_credit(place, peer, n, context);
    memory_.tell_call(place, peer, n, call, handle.root);
  });
}

}  // namespace expertwire::ep::cpu
