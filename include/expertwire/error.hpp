#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

namespace expertwire::inline v0 {

/// What kind of thing went wrong. A caller decides by the code, a person reads the message.
enum class ErrorCode : std::uint8_t {
  invalid_argument = 0,  ///< an argument is outside what is allowed; nothing was sent
  invalid_usage = 1,     ///< a call in the wrong order, or on the wrong object; nothing was sent
  mismatch = 2,          ///< ranks disagree about something they must agree on
  capacity = 3,          ///< a buffer is too small for what was asked of it
  timeout = 4,           ///< a wait reached its deadline
  peer_lost = 5,         ///< a peer's process died or left while it was still needed
  refused = 6,           ///< a peer could not prove that it belongs to this job
  unsupported = 7,       ///< this build or machine cannot do it
  system = 8,            ///< a call to the operating system failed
  failed_earlier = 9,    ///< the object failed in an earlier call and cannot be used any more
};

/// Where in an operation an error arose.
enum class Phase : std::uint8_t {
  none = 0,
  bootstrap = 1,
  setup = 2,
  layout = 3,
  credit = 4,
  counts = 5,
  dispatch_rows = 6,
  combine_weights = 7,
  combine_rows = 8,
  release = 9,
  channel = 10,
};

std::string_view to_string(ErrorCode code) noexcept;
std::string_view to_string(Phase phase) noexcept;

/// Which ranks and which phase an error speaks of; -1 means "no particular rank".
struct ErrorContext {
  int rank = -1;  ///< the rank that reports
  int peer = -1;  ///< the rank it speaks of
  Phase phase = Phase::none;
};

/// The one exception type of expertwire.
///
/// `what()` is a whole sentence that names the argument or the peer, the value seen and what is
/// allowed or what to do next.
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message, ErrorContext context = {});

  ErrorCode code() const noexcept { return code_; }
  int rank() const noexcept { return context_.rank; }
  int peer() const noexcept { return context_.peer; }
  Phase phase() const noexcept { return context_.phase; }

 private:
  ErrorCode code_;
  ErrorContext context_;
};

}  // namespace expertwire
