#include "comm/secret.hpp"

#include <fcntl.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/rand.h>
#include <openssl/sha.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cctype>
#include <cerrno>
#include <cstring>
#include <thread>

#include "base/check.hpp"
#include "comm/socket.hpp"

namespace expertwire::inline v0 {

void fill_random(void* data, std::size_t bytes) {
  check(::RAND_bytes(static_cast<unsigned char*>(data), static_cast<int>(bytes)) == 1,
        ErrorCode::system, "the random source of libcrypto failed");
}

Mac authenticate(const std::string& secret, const std::string& message) {
  Mac mac{};
  unsigned length = 0;
  const unsigned char* result = ::HMAC(
      ::EVP_sha256(), secret.data(), static_cast<int>(secret.size()),
      reinterpret_cast<const unsigned char*>(message.data()), message.size(), mac.data(), &length);
  check(result != nullptr && length == mac.size(), ErrorCode::system, "HMAC of libcrypto failed");
  return mac;
}

bool same(const Mac& a, const Mac& b) { return ::CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0; }

std::string to_hex(const void* data, std::size_t bytes) {
  std::string text;
  for (std::size_t i = 0; i < bytes; ++i)
    text += fmt::format("{:02x}", static_cast<const std::uint8_t*>(data)[i]);
  return text;
}

std::string digest_name(const std::string& text) {
  std::array<std::uint8_t, SHA256_DIGEST_LENGTH> digest{};
  ::SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), digest.data());
  return to_hex(digest.data(), 16);
}

std::string make_secret() {
  std::string secret(32, '\0');
  fill_random(secret.data(), secret.size());
  return secret;
}

std::string parse_secret(const std::string& hex, const std::string& where) {
  std::string secret;
  bool good = hex.size() >= 32 && hex.size() % 2 == 0;
  for (std::size_t i = 0; good && i < hex.size(); i += 2) {
    good = std::isxdigit(static_cast<unsigned char>(hex[i])) != 0 &&
           std::isxdigit(static_cast<unsigned char>(hex[i + 1])) != 0;
    if (good) secret += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  }
  check_argument(good, "{} must hold an even number of hexadecimal digits, at least 32", where);
  return secret;
}

std::string read_secret_file(const std::string& path, Deadline deadline) {
  Fd fd;
  while (!(fd = Fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW)))) {
    const int error = errno;
    check(error == ENOENT, ErrorCode::system, "cannot read the secret file {}: {}", path,
          std::strerror(error));
    check(!deadline.expired(), ErrorCode::timeout,
          "the secret file {} did not appear within {} ms; did rank 0 start on this host?", path,
          deadline.budget().count());
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  struct stat status {};
  check_system(::fstat(fd.get(), &status), "fstat");
  check(status.st_uid == ::geteuid() && (status.st_mode & 077) == 0, ErrorCode::refused,
        "the secret file {} must belong to this user (uid {}) with mode 0600; it belongs to uid {} "
        "with mode {:o}",
        path, ::geteuid(), status.st_uid, status.st_mode & 0777);
  std::string text(4096, '\0');
  const ssize_t bytes = ::read(fd.get(), text.data(), text.size());
  text.resize(bytes > 0 ? static_cast<std::size_t>(bytes) : 0);
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back())) != 0)
    text.pop_back();
  return parse_secret(text, "the secret file " + path);
}

SecretFile::SecretFile(std::string path) : path_(std::move(path)) {
  // Written under another name first, so that nobody reads half a secret; the rename also replaces
  // what a killed job of the same name may have left.
  const std::string draft = path_ + "." + std::to_string(::getpid());
  ::unlink(draft.c_str());
  Fd fd(::open(draft.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600));
  check(static_cast<bool>(fd), ErrorCode::system, "cannot create the secret file {}: {}", draft,
        std::strerror(errno));
  const std::string hex = to_hex(secret_.data(), secret_.size());
  const bool written =
      ::write(fd.get(), hex.data(), hex.size()) == static_cast<ssize_t>(hex.size());
  if (!written || ::rename(draft.c_str(), path_.c_str()) != 0) {
    const int error = errno;
    ::unlink(draft.c_str());
    throw_system("writing the secret file", error);
  }
}

SecretFile::~SecretFile() { ::unlink(path_.c_str()); }

}  // namespace expertwire
