#include "comm/proxy/network_carrier.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/check.hpp"
#include "base/log.hpp"
#include "comm/proxy/mapped_carrier.hpp"

namespace expertwire::inline v0 {

namespace {

constexpr std::size_t kMostQueued = 4096;           // items; then the queue of triggers fills up
constexpr std::size_t kCopied = 2048;               // puts up to so many bytes are copied together
constexpr std::size_t kWritten = 131072;            // of a put, in one remote write
constexpr int kMessagesAtOnce = 4;                  // of one peer, before others have their turn
constexpr std::size_t kMostEarly = 65536;           // messages that wait for one before them
constexpr std::chrono::milliseconds kBeat{100};     // between signs of life
constexpr std::chrono::milliseconds kStopped{200};  // a longer gap: it was this process that stood

}  // namespace

NetworkCarrier::NetworkCarrier(int peer, Engine& engine, std::shared_ptr<NetworkSetting> setting,
                               bool may_write)
    : peer_(peer), engine_(engine), setting_(std::move(setting)), may_write_(may_write) {}

void NetworkCarrier::activate() {
  if (active_) return;
  active_ = true;
  last_sent_ = last_heard_ = Clock::now();
}

bool NetworkCarrier::has_room() const { return dead_ || queue_.size() < kMostQueued; }

void NetworkCarrier::carry(const Cargo& cargo) {
  if (dead_) return;  // whoever waits is told by the job
  activate();
  queue_.push_back({cargo, {}});
}

void NetworkCarrier::flush(const FlushMark& mark) {
  if (dead_) return;
  activate();
  Item item;
  item.cargo.operation = Operation::flush;
  item.mark = mark;
  queue_.push_back(item);
}

bool NetworkCarrier::idle() const { return dead_ || (queue_.empty() && under_way_ == 0); }

// Going out
// ----------------------------------------------------------------------------------------

bool NetworkCarrier::progress() {
  if (dead_) return false;
  if (fault_) {
    give_up(*fault_, false);
    engine_.drop(peer_);
    return true;
  }
  if (last_of_peer_ && applied_ >= *last_of_peer_) {
    give_up({}, true);
    engine_.drop(peer_);
    return true;
  }
  bool moved = std::exchange(stirred_, false);
  for (int i = 0; i < kMessagesAtOnce && !queue_.empty() && !dead_ && !flushing_; ++i) {
    if (put_remotely()) moved = true;
    if (await_puts()) break;
    take_marks();
    if (queue_.empty() || setting_->in_flight >= setting_->most_in_flight) break;
    moved = send_records() || moved;
  }
  if (dead_) return true;
  const bool answer = answer_through_ > answered_ && applied_ >= answer_through_;
  if (question_ || answer) {
    send_note(MessageKind::note, question_);
    moved = true;
  }
  return moved;
}

/// Flushes at the head of the queue wait for what has been sent before them.
void NetworkCarrier::take_marks() {
  while (!queue_.empty() && queue_.front().cargo.operation == Operation::flush) {
    marks_.push_back({sequence_, queue_.front().mark});
    queue_.pop_front();
    question_ = question_ || sequence_ > acknowledged_;
  }
  release_marks();
}

void NetworkCarrier::release_marks() {
  while (!marks_.empty() && marks_.front().sequence <= acknowledged_) {
    release_mark(marks_.front().mark);
    marks_.pop_front();
  }
}

/// Puts at the head of the queue, written by the engine; whether there were any.
bool NetworkCarrier::put_remotely() {
  if (may_write_ && !asked_) {
    asked_ = true;
    may_write_ = engine_.writes_remotely(peer_);
  }
  bool moved = false;
  while (may_write_ && !dead_ && !queue_.empty() &&
         setting_->in_flight < setting_->most_in_flight) {
    Cargo& put = queue_.front().cargo;
    if (put.operation != Operation::put || put.destination->key.empty()) break;
    const std::size_t bytes = std::min<std::size_t>(put.bytes, kWritten);
    if (bytes > 0) {
      Slot& slot = take_slot();
      slot.bytes = bytes;
      setting_->in_flight += bytes;
      ++under_way_;
      unflushed_ = true;
      ++setting_->counters.writes;
      engine_.put(peer_, {put.source, bytes}, put.destination->address + put.offset,
                  put.destination->key, &slot);
    }
    moved = true;
    if (queue_.empty()) break;  // the peer was lost in the call
    put.source += bytes;
    put.offset += bytes;
    put.bytes -= bytes;
    if (put.bytes == 0) queue_.pop_front();
  }
  return moved;
}

/// What follows puts that were written remotely waits until they are in the peer's memory. Puts
/// alone need not: they have no order among themselves.
bool NetworkCarrier::await_puts() {
  if (!unflushed_ || dead_) return flushing_;
  if (queue_.empty() || queue_.front().cargo.operation == Operation::put) return false;
  Slot& slot = take_slot();
  slot.flush = flushing_ = true;
  unflushed_ = false;
  ++under_way_;
  engine_.flush(peer_, &slot);
  return flushing_;
}

NetworkCarrier::Slot& NetworkCarrier::take_slot() {
  if (free_.empty()) {
    slots_.push_back(std::make_unique<Slot>());
    slots_.back()->small.reserve(engine_.message_bytes());
    free_.push_back(slots_.back().get());
  }
  Slot* const slot = free_.back();
  free_.pop_back();
  slot->small.clear();
  slot->count = 1;  // the first piece: head and records
  slot->bytes = 0;
  slot->flush = false;
  slot->front.head = {};
  return *slot;
}

/// Adds a put, or as much of it as there is room for; whether it is done with.
bool NetworkCarrier::add_put(Slot& slot, Item& item) {
  Cargo& put = item.cargo;
  const std::size_t room = engine_.message_bytes() - slot.bytes;
  const std::size_t bytes = std::min<std::size_t>(put.bytes, room);
  const bool copied = bytes <= kCopied;
  Piece* last = &slot.pieces[static_cast<std::size_t>(slot.count - 1)];
  const bool continues = copied && slot.count > 1 && !slot.small.empty() &&
                         static_cast<const std::byte*>(last->data) + last->bytes ==
                             slot.small.data() + slot.small.size();
  if ((bytes == 0 && put.bytes > 0) || (!continues && slot.count == kMostPieces)) return false;
  slot.front.records[slot.front.head.records++] = {put.offset, bytes, put.destination->remote_id,
                                                   Operation::put};
  const void* data = put.source;
  if (copied) {
    const std::byte* const at = slot.small.data() + slot.small.size();
    slot.small.insert(slot.small.end(), put.source, put.source + bytes);
    data = at;
  }
  if (continues)
    last->bytes += bytes;
  else if (bytes > 0)
    slot.pieces[static_cast<std::size_t>(slot.count++)] = {data, bytes};
  slot.bytes += bytes;
  put.source += bytes;
  put.offset += bytes;
  put.bytes -= bytes;
  return put.bytes == 0;
}

bool NetworkCarrier::send_records() {
  Slot& slot = take_slot();
  MessageHead& head = slot.front.head;
  while (!queue_.empty() && head.records < kMostRecords) {
    Item& item = queue_.front();
    const Cargo& cargo = item.cargo;
    if (unflushed_ && cargo.operation != Operation::put) break;
    if (cargo.operation == Operation::flush) {
      marks_.push_back({sequence_ + 1, item.mark});
      head.wants_answer = 1;
    } else if (cargo.operation == Operation::put) {
      if (!add_put(slot, item)) break;
    } else {
      slot.front.records[head.records++] = {cargo.offset, static_cast<std::uint64_t>(cargo.value),
                                            cargo.destination->remote_id, cargo.operation};
    }
    queue_.pop_front();
  }
  head.kind = MessageKind::records;
  head.sequence = ++sequence_;
  post(slot);
  ++setting_->counters.messages;
  return true;
}

void NetworkCarrier::send_note(MessageKind kind, bool wants_answer) {
  Slot& slot = take_slot();
  slot.front.head.kind = kind;
  slot.front.head.sequence = sequence_;
  slot.front.head.wants_answer = wants_answer ? 1 : 0;
  if (wants_answer) question_ = false;
  post(slot);
}

void NetworkCarrier::post(Slot& slot) {
  MessageHead& head = slot.front.head;
  head.job = setting_->job;
  head.source = setting_->rank;
  head.applied = answered_ = applied_;
  slot.pieces[0] = {&slot.front, sizeof(MessageHead) + head.records * sizeof(MessageRecord)};
  slot.bytes += slot.pieces[0].bytes;
  setting_->in_flight += slot.bytes;
  if (head.records > 0) setting_->counters.message_bytes += slot.bytes;
  ++under_way_;
  last_sent_ = Clock::now();
  engine_.send(peer_, slot.pieces.data(), slot.count, &slot);
}

void NetworkCarrier::sent(void* token) noexcept {
  auto* const slot = static_cast<Slot*>(token);
  setting_->in_flight -= slot->bytes;
  if (slot->flush) flushing_ = false;
  --under_way_;
  free_.push_back(slot);
}

// Coming in
// ----------------------------------------------------------------------------------------

void NetworkCarrier::receive(const MessageHead& head, const std::byte* body, std::size_t bytes) {
  if (dead_ || fault_) return;
  activate();
  last_heard_ = Clock::now();
  if (head.applied > sequence_) {
    fault_ = fmt::format("rank {} confirms message {}, of {} that were sent", peer_, head.applied,
                         sequence_);
    return;
  }
  acknowledged_ = std::max(acknowledged_, head.applied);
  release_marks();
  if (head.wants_answer != 0) answer_through_ = std::max(answer_through_, head.sequence);
  if (head.kind == MessageKind::goodbye) last_of_peer_ = head.sequence;
  if (head.kind != MessageKind::records) return;
  stirred_ = true;
  std::vector<Word> words;
  std::string wrong = place(head, body, bytes, words);
  if (wrong.empty() &&
      (head.sequence <= applied_ || early_.contains(head.sequence) || early_.size() >= kMostEarly))
    wrong = fmt::format("its number {} cannot be, behind {}", head.sequence, applied_);
  if (!wrong.empty())
    fault_ = fmt::format("a message of rank {} was refused: {}", peer_, wrong);
  else
    apply(head.sequence, std::move(words));
}

/// Checks all records, then puts bytes in their places; says what is wrong, if anything is.
std::string NetworkCarrier::place(const MessageHead& head, const std::byte* body, std::size_t bytes,
                                  std::vector<Word>& words) const {
  if (head.records > kMostRecords || bytes < head.records * sizeof(MessageRecord))
    return fmt::format("{} bytes are too few for {} records", bytes, head.records);
  std::array<MessageRecord, kMostRecords> records;
  std::array<std::byte*, kMostRecords> places;
  const std::size_t length = head.records * sizeof(MessageRecord);
  std::memcpy(records.data(), body, length);
  std::size_t left = bytes - length;
  for (std::uint32_t i = 0; i < head.records; ++i) {
    const MessageRecord& r = records[i];
    const MemoryTable::Entry* memory = setting_->memories->find(r.memory);
    if (memory == nullptr || memory->rank != setting_->rank)
      return fmt::format("memory {} is not registered here, or not any more", r.memory);
    if (memory->kind != MemoryKind::host)
      return fmt::format("memory {} is device memory, which networks do not reach yet", r.memory);
    const bool put = r.operation == Operation::put;
    if (!put && r.operation != Operation::store && r.operation != Operation::atomic_add)
      return fmt::format("there is no operation {}", static_cast<unsigned>(r.operation));
    const std::uint64_t size = put ? r.value : sizeof(std::uint64_t);
    if (r.offset > memory->bytes || size > memory->bytes - r.offset)
      return fmt::format("{} bytes at {} lie outside memory {} of {}", size, r.offset, r.memory,
                         memory->bytes);
    if (!put && r.offset % sizeof(std::uint64_t) != 0)
      return fmt::format("the word at {} is not 8-byte aligned", r.offset);
    if (put && size > left) return fmt::format("a put of {} bytes brings {}", size, left);
    if (put) left -= size;
    places[i] = memory->data + r.offset;
  }
  if (left != 0) return fmt::format("{} bytes belong to no record", left);
  const std::byte* data = body + length;
  for (std::uint32_t i = 0; i < head.records; ++i) {
    if (records[i].operation != Operation::put) {
      words.push_back(
          {places[i], records[i].operation, static_cast<std::int64_t>(records[i].value)});
      continue;
    }
    if (records[i].value > 0) std::memcpy(places[i], data, records[i].value);
    data += records[i].value;
  }
  return {};
}

void NetworkCarrier::apply(std::uint64_t sequence, std::vector<Word> words) {
  if (sequence != applied_ + 1) {
    early_[sequence] = std::move(words);
    return;
  }
  for (;;) {
    for (const Word& word : words) apply_to_word(word.at, word.operation, word.value);
    ++applied_;
    const auto next = early_.find(applied_ + 1);
    if (next == early_.end()) return;
    words = std::move(next->second);
    early_.erase(next);
  }
}

// Life and death
// -----------------------------------------------------------------------------------

void NetworkCarrier::tick(Clock::time_point now) {
  if (now - last_tick_ > kStopped) last_heard_ += now - last_tick_;
  last_tick_ = now;
  if (dead_) return;
  if (expected_.load(std::memory_order_relaxed)) activate();
  if (!active_) return;
  if (now - last_sent_ > kBeat) send_note(MessageKind::note, false);
  if (!dead_ && now - last_heard_ > setting_->silence) {
    give_up(fmt::format("nothing was heard of rank {} for {} ms", peer_, setting_->silence.count()),
            false);
    engine_.drop(peer_);
  }
}

void NetworkCarrier::say_goodbye() {
  if (active_ && !dead_) send_note(MessageKind::goodbye, false);
}

void NetworkCarrier::lost(std::string_view why) noexcept {
  try {
    give_up(fmt::format("the way to rank {} broke: {}", peer_, why), false);
  } catch (const std::exception&) {
    dead_ = true;
  }
}

void NetworkCarrier::give_up(const std::string& why, bool in_good_order) noexcept {
  if (dead_) return;
  dead_ = true;
  queue_.clear();
  marks_.clear();
  early_.clear();
  try {
    setting_->lost(peer_, why, in_good_order);
  } catch (const std::exception&) {  // no memory to say so; waits end at their deadlines
  }
}

// What an engine says
// ------------------------------------------------------------------------------

void NetworkClient::received(const std::byte* data, std::size_t bytes) noexcept {
  MessageHead head{};
  if (bytes >= sizeof(head)) std::memcpy(&head, data, sizeof(head));
  const auto it = head.job == setting_->job ? carriers_.find(head.source) : carriers_.end();
  if (bytes < sizeof(head) || it == carriers_.end()) {
    const auto count = strangers_.fetch_add(1) + 1;
    log(LogLevel::warn, Subsystem::conn, "dropped a message of a stranger (the {}. so far)", count);
    return;
  }
  try {
    it->second->receive(head, data + sizeof(head), bytes - sizeof(head));
  } catch (const std::exception& error) {
    it->second->lost(error.what());
  }
}

void NetworkClient::sent(int peer, void* token) noexcept {
  if (const auto it = carriers_.find(peer); it != carriers_.end()) it->second->sent(token);
}

void NetworkClient::lost(int peer, std::string_view why) noexcept {
  if (const auto it = carriers_.find(peer); it != carriers_.end()) it->second->lost(why);
}

}  // namespace expertwire
