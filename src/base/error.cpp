#include "expertwire/error.hpp"

#include <fmt/format.h>

#include <iterator>

namespace expertwire::inline v0 {

std::string_view to_string(ErrorCode code) noexcept {
  switch (code) {
    case ErrorCode::invalid_argument:
      return "invalid argument";
    case ErrorCode::invalid_usage:
      return "invalid usage";
    case ErrorCode::mismatch:
      return "mismatch between ranks";
    case ErrorCode::capacity:
      return "out of capacity";
    case ErrorCode::timeout:
      return "timeout";
    case ErrorCode::peer_lost:
      return "peer lost";
    case ErrorCode::refused:
      return "refused";
    case ErrorCode::unsupported:
      return "unsupported";
    case ErrorCode::system:
      return "system error";
    case ErrorCode::failed_earlier:
      return "failed earlier";
  }
  return "?";
}

std::string_view to_string(Phase phase) noexcept {
  switch (phase) {
    case Phase::none:
      return "";
    case Phase::bootstrap:
      return "bootstrap";
    case Phase::setup:
      return "setup";
    case Phase::layout:
      return "layout";
    case Phase::credit:
      return "credit";
    case Phase::counts:
      return "counts";
    case Phase::dispatch_rows:
      return "dispatch rows";
    case Phase::combine_weights:
      return "combine weights";
    case Phase::combine_rows:
      return "combine rows";
    case Phase::release:
      return "release";
    case Phase::channel:
      return "channel";
  }
  return "?";
}

namespace {

std::string compose(ErrorCode code, const std::string& message, const ErrorContext& context) {
  std::string text = fmt::format("expertwire: {}", to_string(code));
  auto out = std::back_inserter(text);
  if (context.rank >= 0) fmt::format_to(out, " on rank {}", context.rank);
  if (context.phase != Phase::none) fmt::format_to(out, " ({})", to_string(context.phase));
  fmt::format_to(out, ": {}", message);
  return text;
}

}  // namespace

Error::Error(ErrorCode code, const std::string& message, ErrorContext context)
    : std::runtime_error(compose(code, message, context)), code_(code), context_(context) {}

}  // namespace expertwire
