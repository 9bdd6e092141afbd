#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "expertwire/deadline.hpp"

namespace expertwire::inline v0 {

using Nonce = std::array<std::uint8_t, 16>;
using Mac = std::array<std::uint8_t, 32>;

/// Bytes from the operating system's random source.
void fill_random(void* data, std::size_t bytes);

/// HMAC-SHA256 of `message` under `secret`.
Mac authenticate(const std::string& secret, const std::string& message);
/// Compares in constant time.
bool same(const Mac& a, const Mac& b);

/// The first 32 hexadecimal digits of SHA-256: a short name for a long text.
std::string digest_name(const std::string& text);
std::string to_hex(const void* data, std::size_t bytes);

/// 32 fresh random bytes.
std::string make_secret();
/// From at least 32 hexadecimal digits; `where` names the source in errors.
std::string parse_secret(const std::string& hex, const std::string& where);

/// Reads a secret from a file that must belong to this user with no access for others. While the
/// file does not exist the call waits, until the deadline.
std::string read_secret_file(const std::string& path, Deadline deadline);

/// A fresh secret in a new file of mode 0600, which goes away with this object.
class SecretFile {
 public:
  explicit SecretFile(std::string path);
  SecretFile(const SecretFile&) = delete;
  SecretFile& operator=(const SecretFile&) = delete;
  ~SecretFile();
  const std::string& secret() const { return secret_; }

 private:
  std::string path_;
  std::string secret_ = make_secret();
};

}  // namespace expertwire
