#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace expertwire::inline v0 {

/// A piece of a message, in memory of the sender.
struct Piece {
  const void* data = nullptr;
  std::size_t bytes = 0;
};

/// What moves messages between hosts: one worker of it a proxy, called by one thread at a time.
/// Messages arrive whole and once; nothing is assumed about their order.
class Engine {
 public:
  /// Whom an engine tells; called inside its calls.
  class Client {
   public:
    Client() = default;
    Client(const Client&) = delete;
    Client& operator=(const Client&) = delete;
    virtual ~Client() = default;
    /// A message has come, from whoever says so in it. The bytes are the engine's.
    virtual void received(const std::byte* data, std::size_t bytes) noexcept = 0;
    /// The pieces of the message `token` may be used again.
    virtual void sent(int peer, void* token) noexcept = 0;
    /// The engine gives a peer up; nothing is sent to it any more.
    virtual void lost(int peer, std::string_view why) noexcept = 0;
  };

  Engine() = default;
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  virtual ~Engine() = default;

  /// Where its peers reach it; bytes.
  virtual const std::string& address() const = 0;
  /// The bytes at most of a message that is moved well.
  virtual std::size_t message_bytes() const = 0;
  virtual void set_client(Client* client) = 0;
  virtual void set_address(int peer, std::string address) = 0;
  /// Sends a message; sent() may come within the call. Connects first if need be.
  virtual void send(int peer, const Piece* pieces, int count, void* token) = 0;
  /// Whether bytes go into the memory of `peer` without its help, natively: then puts and flushes
  /// below are used, else messages alone. Connects if need be.
  virtual bool writes_remotely(int) { return false; }
  /// What peers need to write to memory of this rank; empty if they cannot.
  virtual std::string make_key(void*, std::size_t) { return {}; }
  /// Writes to `address` of the peer; `key` is what make_key() gave there, and stays where it is.
  virtual void put(int, const Piece&, std::uint64_t, const std::string&, void*) {}
  /// sent() says when all that was put to the peer before is in its memory.
  virtual void flush(int, void*) {}
  /// Whether anything moved.
  virtual bool progress() = 0;
  /// Closes the way to a peer at once; what was under way comes back by sent().
  virtual void drop(int peer) noexcept = 0;
};

/// Pieces of a message at most.
inline constexpr int kMostPieces = 5;

}  // namespace expertwire
