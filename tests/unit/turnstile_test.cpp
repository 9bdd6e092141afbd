#include <gtest/gtest.h>

#include <memory>
#include <thread>

#include "ep/front/object.hpp"

namespace expertwire::ep {
namespace {

Deadline in_ms(int ms) { return Deadline::after(std::chrono::milliseconds(ms)); }

TEST(Turnstile, TurnsComeInTheOrderInWhichTheyWereDrawn) {
  Turnstile turnstile;
  auto first = std::make_unique<Turn>(turnstile);
  Turn second(turnstile);
  EXPECT_FALSE(second.enter(in_ms(5)));
  EXPECT_TRUE(first->enter(in_ms(0)));
  EXPECT_FALSE(second.enter(in_ms(5)));
  std::thread ends([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    first.reset();
  });
  EXPECT_TRUE(second.enter(in_ms(10000)));
  ends.join();
}

/// Work that was never queued, because a stream refused it, holds up nobody.
TEST(Turnstile, ATurnThatIsNeverTakenIsPassedOver) {
  Turnstile turnstile;
  auto first = std::make_unique<Turn>(turnstile), second = std::make_unique<Turn>(turnstile);
  auto third = std::make_unique<Turn>(turnstile);
  second.reset();
  EXPECT_FALSE(third->enter(in_ms(5)));
  first.reset();
  EXPECT_TRUE(third->enter(in_ms(0)));
  EXPECT_FALSE(turnstile.drain(in_ms(5)));
  third.reset();
  EXPECT_TRUE(turnstile.drain(in_ms(0)));
}

}  // namespace
}  // namespace expertwire::ep
