#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "comm/proxy/carrier.hpp"
#include "comm/proxy/engine.hpp"
#include "comm/proxy/message.hpp"

namespace expertwire::inline v0 {

/// What a proxy has sent so far. Read by any thread.
struct NetworkCounters {
  std::atomic<std::uint64_t> messages{0};       ///< with records
  std::atomic<std::uint64_t> message_bytes{0};  ///< of those, heads and records included
  std::atomic<std::uint64_t> writes{0};         ///< remote writes
};

/// What the carriers of one proxy share. Used by one thread at a time.
struct NetworkSetting {
  std::uint64_t job = 0;
  int rank = 0;
  const MemoryTable* memories = nullptr;
  std::size_t most_in_flight = 0;           ///< bytes handed to the engine and not yet sent
  std::chrono::milliseconds silence{5000};  ///< after which a peer is taken for dead
  /// A peer is gone, in good order or not; told once.
  std::function<void(int peer, const std::string& why, bool in_good_order)> lost;
  std::size_t in_flight = 0;
  NetworkCounters counters;
};

/// To a peer behind a network, by messages. Records for the peer are merged while messages before
/// them are under way. Nothing is assumed about the order of messages: the receiver places what
/// puts bring at once, and applies stores and adds of a message when it has placed all messages
/// before.
class NetworkCarrier final : public Carrier {
 public:
  /// Remote writes are used if `may_write` and the engine has native ones.
  NetworkCarrier(int peer, Engine& engine, std::shared_ptr<NetworkSetting> setting,
                 bool may_write = false);

  bool has_room() const override;
  void carry(const Cargo& cargo) override;
  void flush(const FlushMark& mark) override;
  bool progress() override;
  bool idle() const override;
  void tick(Clock::time_point now) override;
  void say_goodbye() override;

  /// By any thread: somebody waits for this peer, so that it is to be looked after from now on.
  void expect() noexcept override { expected_.store(true, std::memory_order_relaxed); }

  // What the engine says, for this peer.
  void receive(const MessageHead& head, const std::byte* body, std::size_t bytes);
  void sent(void* token) noexcept;
  void lost(std::string_view why) noexcept;

 private:
  struct Item {
    Cargo cargo;
    FlushMark mark;  ///< of a flush
  };
  struct Slot {
    struct {
      MessageHead head;
      std::array<MessageRecord, kMostRecords> records;
    } front;
    std::vector<std::byte> small;  ///< copies of short puts
    std::array<Piece, kMostPieces> pieces;
    int count = 0;
    std::size_t bytes = 0;
    bool flush = false;  ///< stands for a flush of the engine
  };
  struct Word {
    std::byte* at;
    Operation operation;
    std::int64_t value;
  };
  struct Waiting {
    std::uint64_t sequence;
    FlushMark mark;
  };

  void activate();
  Slot& take_slot();
  bool send_records();
  bool put_remotely();
  bool await_puts();
  bool add_put(Slot& slot, Item& item);
  void take_marks();
  void send_note(MessageKind kind, bool wants_answer);
  void post(Slot& slot);
  void release_marks();
  std::string place(const MessageHead& head, const std::byte* body, std::size_t bytes,
                    std::vector<Word>& words) const;
  void apply(std::uint64_t sequence, std::vector<Word> words);
  void give_up(const std::string& why, bool in_good_order) noexcept;

  int peer_;
  Engine& engine_;
  std::shared_ptr<NetworkSetting> setting_;
  std::atomic<bool> expected_{false};
  bool active_ = false, dead_ = false;
  bool may_write_, asked_ = false;  ///< asked: whether the engine writes remotely is known
  bool unflushed_ = false, flushing_ = false;  ///< puts that words must not overtake
  std::optional<std::string> fault_;           ///< found while the engine was calling
  Clock::time_point last_sent_{}, last_heard_{}, last_tick_{};

  // Going out.
  std::deque<Item> queue_;
  std::uint64_t sequence_ = 0;  ///< of the last message sent
  std::uint64_t acknowledged_ = 0;
  std::deque<Waiting> marks_;
  bool question_ = false;  ///< a flush waits for messages that have all been sent
  std::vector<std::unique_ptr<Slot>> slots_;
  std::vector<Slot*> free_;
  int under_way_ = 0;

  // Coming in.
  bool stirred_ = false;  ///< records have come since the last progress()
  std::uint64_t applied_ = 0;
  std::map<std::uint64_t, std::vector<Word>> early_;  ///< messages that came before others
  std::uint64_t answer_through_ = 0, answered_ = 0;
  std::optional<std::uint64_t> last_of_peer_;  ///< sequence at its goodbye
};

/// Hands what an engine says to the carriers of its proxy.
class NetworkClient final : public Engine::Client {
 public:
  explicit NetworkClient(std::shared_ptr<NetworkSetting> setting) : setting_(std::move(setting)) {}
  void add(int peer, NetworkCarrier* carrier) { carriers_[peer] = carrier; }
  /// Messages that were not of this job, or of no rank that this proxy serves.
  std::uint64_t strangers() const { return strangers_.load(std::memory_order_relaxed); }

  void received(const std::byte* data, std::size_t bytes) noexcept override;
  void sent(int peer, void* token) noexcept override;
  void lost(int peer, std::string_view why) noexcept override;

 private:
  std::shared_ptr<NetworkSetting> setting_;
  std::map<int, NetworkCarrier*> carriers_;
  std::atomic<std::uint64_t> strangers_{0};
};

}  // namespace expertwire
