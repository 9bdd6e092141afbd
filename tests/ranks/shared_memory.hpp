#pragma once

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "expertwire/communicator.hpp"

namespace expertwire::test {

/// The ways between two ranks on which the same tests run.
enum class Wire { loopback, shm, ucx };

/// Memory of every rank, registered and opened by all: the user's own where a wire takes that.
class SharedMemory {
 public:
  SharedMemory(Communicator& communicator, Wire wire, std::size_t bytes)
      : communicator_(communicator) {
    const auto rank = static_cast<std::size_t>(communicator.rank());
    if (wire == Wire::shm) {
      mine_ = communicator.allocate_memory(bytes);
    } else {
      own_ = std::make_unique<std::uint64_t[]>(bytes / 8 + 1);
      mine_ = communicator.register_memory(own_.get(), bytes);
    }
    std::memset(mine_.data(), 0, bytes);
    using Text = std::array<char, 512>;
    std::vector<Text> texts(static_cast<std::size_t>(communicator.size()));
    const std::string text = mine_.serialize();
    texts[rank][0] = static_cast<char>(text.size() / 256);
    texts[rank][1] = static_cast<char>(text.size() % 256);
    std::memcpy(&texts[rank][2], text.data(), text.size());
    communicator.all_gather(texts.data(), sizeof(Text));
    for (const Text& t : texts) {
      const auto length = static_cast<std::size_t>(static_cast<unsigned char>(t[0])) * 256 +
                          static_cast<unsigned char>(t[1]);
      all_.push_back(communicator.open_memory({&t[2], length}));
    }
  }
  /// Collective, and only once all puts have been flushed.
  ~SharedMemory() {
    communicator_.barrier();
    communicator_.deregister_memory(mine_);
  }

  const Memory& mine() const { return mine_; }
  const Memory& of(int rank) const { return all_[static_cast<std::size_t>(rank)]; }
  std::uint64_t* words(std::size_t offset = 0) const {
    return reinterpret_cast<std::uint64_t*>(mine_.data() + offset);
  }
  std::uint64_t acquire(std::size_t offset) const {
    return std::atomic_ref(*words(offset)).load(std::memory_order_acquire);
  }
  /// Waits for a word of this rank, at most ten seconds.
  void await(std::size_t offset, std::uint64_t value) const {
    const Deadline deadline = Deadline::after(std::chrono::seconds(10));
    while (acquire(offset) < value) {
      ASSERT_FALSE(deadline.expired()) << "word at " << offset << " never became " << value;
      std::this_thread::yield();
    }
  }

 private:
  Communicator& communicator_;
  std::unique_ptr<std::uint64_t[]> own_;
  Memory mine_;
  std::vector<Memory> all_;
};

/// What a call says when it refuses.
template <class Call>
std::string refusal(Call call, ErrorCode code = ErrorCode::invalid_argument) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    return error.what();
  }
  return "no error";
}

inline Deadline soon() { return Deadline::after(std::chrono::seconds(10)); }

/// A word that tells bytes of one message from those of another.
inline std::uint64_t pattern(std::uint64_t message, std::uint64_t i) {
  std::uint64_t x = message * 0x9E3779B97F4A7C15ULL + i * 0xC2B2AE3D27D4EB4FULL;
  return x ^ (x >> 29);
}

}  // namespace expertwire::test
