#include "log.hpp"

#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <array>
#include <bitset>
#include <string>

#include "check.hpp"
#include "env.hpp"

namespace expertwire::inline v0 {

namespace {

constexpr std::array kSubsystemNames = {"boot", "topo", "mem", "conn", "ep", "tool"};
constexpr std::array kLevelNames = {"trace", "debug", "info", "warn", "error", "off"};
constexpr std::array kSpdlogLevels = {spdlog::level::trace, spdlog::level::debug,
                                      spdlog::level::info,  spdlog::level::warn,
                                      spdlog::level::err,   spdlog::level::off};

LogLevel parse_level(const std::string& text) {
  for (std::size_t i = 0; i < kLevelNames.size(); ++i)
    if (text == kLevelNames[i]) return static_cast<LogLevel>(i);
  throw Error(ErrorCode::invalid_argument,
              fmt::format("EXPERTWIRE_LOG={} must be one of {}", text,
                          fmt::join(kLevelNames.begin(), kLevelNames.end(), ", ")));
}

std::bitset<kSubsystemNames.size()> parse_subsystems(std::string text) {
  std::bitset<kSubsystemNames.size()> set;
  const bool invert = !text.empty() && text.front() == '^';
  if (invert) text.erase(0, 1);
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    const std::string name = text.substr(begin, end - begin);
    bool known = name.empty() || name == "all";
    if (name == "all") set.set();
    for (std::size_t i = 0; i < kSubsystemNames.size(); ++i)
      if (name == kSubsystemNames[i]) set.set(i), known = true;
    check_argument(known, "EXPERTWIRE_LOG_SUBSYS names '{}'; it must be all or among {}", name,
                   fmt::join(kSubsystemNames.begin(), kSubsystemNames.end(), ", "));
    begin = end + 1;
  }
  return invert ? ~set : set;
}

std::string expand_file_name(const std::string& pattern) {
  std::string name;
  for (std::size_t i = 0; i < pattern.size(); ++i) {
    if (pattern.compare(i, 2, "%p") == 0) {
      name += std::to_string(::getpid()), ++i;
    } else if (pattern.compare(i, 2, "%h") == 0) {
      std::array<char, 256> host{};
      ::gethostname(host.data(), host.size() - 1);
      name += host.data(), ++i;
    } else {
      name += pattern[i];
    }
  }
  return name;
}

struct Logger {
  LogLevel level = parse_level(Env::get().log);
  std::bitset<kSubsystemNames.size()> subsystems = parse_subsystems(Env::get().log_subsystems);
  std::shared_ptr<spdlog::logger> sink;

  Logger() {
    spdlog::sink_ptr target;
    if (Env::get().log_file.empty())
      target = std::make_shared<spdlog::sinks::stderr_sink_mt>();
    else
      target = std::make_shared<spdlog::sinks::basic_file_sink_mt>(
          expand_file_name(Env::get().log_file));
    sink = std::make_shared<spdlog::logger>("expertwire", target);
    sink->set_pattern("%H:%M:%S.%e %P %l %v");
    sink->set_level(spdlog::level::trace);
    sink->flush_on(spdlog::level::info);
  }
};

Logger& logger() {
  static Logger instance;
  return instance;
}

}  // namespace

bool log_enabled(LogLevel level, Subsystem subsystem) noexcept {
  try {
    const Logger& instance = logger();
    return level >= instance.level && instance.subsystems.test(static_cast<std::size_t>(subsystem));
  } catch (const std::exception&) {
    return false;  // a bad EXPERTWIRE_LOG is reported where a communicator is made
  }
}

void log_line(LogLevel level, Subsystem subsystem, std::string_view line) noexcept {
  try {
    logger().sink->log(kSpdlogLevels[static_cast<std::size_t>(level)], "[{}] {}",
                       kSubsystemNames[static_cast<std::size_t>(subsystem)], line);
  } catch (const std::exception&) {
    // A log line that cannot be written must not end the job.
  }
}

void check_log_settings() { logger(); }

}  // namespace expertwire
