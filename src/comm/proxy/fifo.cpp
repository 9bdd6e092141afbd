#include "comm/proxy/fifo.hpp"

#include "base/check.hpp"

namespace expertwire::inline v0 {

std::unique_ptr<Fifo> Fifo::for_threads(std::uint64_t capacity) {
  check_argument(capacity >= 2 && (capacity & (capacity - 1)) == 0,
                 "Fifo: capacity is {}; it must be a power of two, 2 at least", capacity);
  struct alignas(64) Line {
    std::uint64_t words[8];
  };
  struct Memory {
    Line producers{}, consumer{};
    std::unique_ptr<Trigger[]> slots;
  };
  auto memory = std::make_shared<Memory>();
  memory->slots = std::make_unique<Trigger[]>(capacity);
  FifoView view;
  view.slots = memory->slots.get();
  view.head = &memory->producers.words[0];
  view.tail_seen = &memory->producers.words[1];
  view.tail = &memory->consumer.words[0];
  view.capacity = capacity;
  return std::make_unique<Fifo>(view, std::move(memory));
}

}  // namespace expertwire
