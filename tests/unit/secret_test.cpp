#include "comm/secret.hpp"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <thread>

#include "comm/handshake.hpp"
#include "expertwire/error.hpp"

namespace expertwire {
namespace {

std::string fresh_name(const char* what) {
  Nonce nonce{};
  fill_random(nonce.data(), nonce.size());
  return std::string(what) + to_hex(nonce.data(), 8);
}

TEST(Secret, HmacIsTheStandardOne) {
  // RFC 4231, test case 2.
  const Mac mac = authenticate("Jefe", "what do ya want for nothing?");
  EXPECT_EQ(to_hex(mac.data(), mac.size()),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
}

TEST(Secret, ParsesHexOfEnoughLength) {
  EXPECT_EQ(parse_secret(std::string(32, 'a'), "x"), std::string(16, '\xaa'));
  for (const std::string& bad : {std::string(30, 'a'), std::string(33, 'a'), std::string(32, 'g')})
    EXPECT_THROW(parse_secret(bad, "x"), Error);
}

TEST(SecretFile, IsPrivateAndGoesAway) {
  const std::string path = testing::TempDir() + fresh_name("secret-");
  {
    const SecretFile file(path);
    struct stat status {};
    ASSERT_EQ(::stat(path.c_str(), &status), 0);
    EXPECT_EQ(status.st_mode & 0777, 0600U);
    EXPECT_EQ(read_secret_file(path, Deadline::after(std::chrono::seconds(1))), file.secret());
  }
  EXPECT_NE(::access(path.c_str(), F_OK), 0);
}

TEST(SecretFile, OthersMayNotReadIt) {
  const std::string path = testing::TempDir() + fresh_name("secret-");
  std::ofstream(path) << std::string(64, 'a');
  ::chmod(path.c_str(), 0644);
  try {
    read_secret_file(path, Deadline::after(std::chrono::seconds(1)));
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::refused);
    EXPECT_NE(std::string(error.what()).find("0600"), std::string::npos);
  }
  ::unlink(path.c_str());
}

TEST(SecretFile, WaitsForItUntilTheDeadline) {
  EXPECT_THROW(read_secret_file(testing::TempDir() + fresh_name("none-"),
                                Deadline::after(std::chrono::milliseconds(30))),
               Error);
}

TEST(Handshake, LetsFriendsInAndDropsStrangers) {
  const std::string address = fresh_name("@ew-test-");
  const Party host{"the job's secret", "rendezvous", 0, 3};
  Acceptor acceptor(listen_on(address), host);
  const Deadline deadline = Deadline::after(std::chrono::seconds(20));
  // One that says nothing, one with another secret, one of another size, one for another purpose.
  Fd silent = connect_to(address, deadline);
  std::thread guests([&] {
    EXPECT_FALSE(connect_authenticated(address, {"wrong", "rendezvous", 1, 3}, 0, deadline));
    EXPECT_FALSE(connect_authenticated(address, {host.secret, "rendezvous", 1, 4}, 0, deadline));
    EXPECT_FALSE(connect_authenticated(address, {host.secret, "link", 1, 3}, 0, deadline));
    EXPECT_TRUE(connect_authenticated(address, {host.secret, "rendezvous", 2, 3}, 0, deadline));
  });
  const Acceptor::Guest guest = acceptor.next(deadline);
  guests.join();
  EXPECT_EQ(guest.rank, 2);
  EXPECT_EQ(acceptor.strangers(), 3);
  // The silent one is dropped for want of patience, and nobody else comes.
  EXPECT_EQ(acceptor.next(Deadline::after(std::chrono::milliseconds(2500))).rank, -1);
  EXPECT_EQ(acceptor.strangers(), 4);
}

TEST(Handshake, GuestFindsOutAFalseHost) {
  const std::string address = fresh_name("@ew-test-");
  Acceptor impostor(listen_on(address), {"not the secret", "rendezvous", 0, 2});
  std::thread thread([&] { impostor.next(Deadline::after(std::chrono::milliseconds(300))); });
  EXPECT_FALSE(connect_authenticated(address, {"the secret", "rendezvous", 1, 2}, 0,
                                     Deadline::after(std::chrono::seconds(5))));
  thread.join();
}

TEST(Socket, ConnectGivesUpAtTheDeadline) {
  EXPECT_THROW(connect_to(fresh_name("@ew-none-"), Deadline::after(std::chrono::milliseconds(30))),
               Error);
  EXPECT_THROW(connect_to("no-port", Deadline::after(std::chrono::milliseconds(30))), Error);
}

}  // namespace
}  // namespace expertwire
