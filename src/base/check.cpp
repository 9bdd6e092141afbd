#include "check.hpp"

#include <cerrno>
#include <system_error>

namespace expertwire::inline v0 {

void throw_system(const char* call, int error_number) {
  throw Error(ErrorCode::system,
              fmt::format("{} failed: {} (errno {})", call,
                          std::generic_category().message(error_number), error_number));
}

int check_system(int result, const char* call) {
  if (result < 0) [[unlikely]]
    throw_system(call, errno);
  return result;
}

}  // namespace expertwire
