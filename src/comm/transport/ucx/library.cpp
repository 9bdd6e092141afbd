#include "comm/transport/ucx/library.hpp"

#include <dlfcn.h>

#include <utility>

#include "base/check.hpp"
#include "base/env.hpp"
#include "base/log.hpp"

namespace expertwire::inline v0 {

namespace {

constexpr unsigned kOldestMajor = 1, kOldestMinor = 13;

/// What is set where the user has set nothing. UCX reads TCP's settings from the environment alone.
constexpr std::pair<const char*, const char*> kDefaults[] = {
    {"UCX_RNDV_THRESH", "inf"},      // messages go at once, without asking the receiver
    {"UCX_TCP_TX_SEG_SIZE", "64k"},  // a message of ours is one fragment
    {"UCX_TCP_RX_SEG_SIZE", "64k"},
    {"UCX_TCP_USER_TIMEOUT", "2s"},  // a link that is down shows
                                     // in seconds, not minutes
    {"UCX_TCP_KEEPIDLE", "1s"},
    {"UCX_TCP_KEEPINTVL", "1s"},
    {"UCX_TCP_KEEPCNT", "2"},
    {"UCX_KEEPALIVE_INTERVAL", "1s"},
    {"UCX_ERROR_SIGNALS", ""},          // signals are the program's
    {"UCX_MEM_EVENTS", "n"},            // no hooks in malloc
    {"UCX_WARN_UNUSED_ENV_VARS", "n"},  // older versions do not know all of these
    {"UCX_LOG_LEVEL", "fatal"},         // what fails is reported here, with the peer's name
};

template <class Function>
bool find(void* library, const char* name, Function& function, std::string& missing) {
  function = reinterpret_cast<Function>(::dlsym(library, name));
  if (function == nullptr) missing = name;
  return function != nullptr;
}

bool find_all(void* library, UcxCalls& c, std::string& missing) {
  return find(library, "ucp_get_version", c.get_version, missing) &&
         find(library, "ucp_config_read", c.config_read, missing) &&
         find(library, "ucp_config_release", c.config_release, missing) &&
         find(library, "ucp_init_version", c.init_version, missing) &&
         find(library, "ucp_cleanup", c.cleanup, missing) &&
         find(library, "ucp_worker_create", c.worker_create, missing) &&
         find(library, "ucp_worker_destroy", c.worker_destroy, missing) &&
         find(library, "ucp_worker_get_address", c.worker_get_address, missing) &&
         find(library, "ucp_worker_release_address", c.worker_release_address, missing) &&
         find(library, "ucp_worker_set_am_recv_handler", c.worker_set_am_recv_handler, missing) &&
         find(library, "ucp_worker_progress", c.worker_progress, missing) &&
         find(library, "ucp_ep_create", c.ep_create, missing) &&
         find(library, "ucp_ep_close_nbx", c.ep_close, missing) &&
         find(library, "ucp_ep_flush_nbx", c.ep_flush, missing) &&
         find(library, "ucp_am_send_nbx", c.am_send, missing) &&
         find(library, "ucp_request_check_status", c.request_check_status, missing) &&
         find(library, "ucp_request_free", c.request_free, missing) &&
         find(library, "ucp_mem_map", c.mem_map, missing) &&
         find(library, "ucp_mem_unmap", c.mem_unmap, missing) &&
         find(library, "ucp_rkey_pack", c.rkey_pack, missing) &&
         find(library, "ucp_rkey_buffer_release", c.rkey_buffer_release, missing) &&
         find(library, "ucp_ep_rkey_unpack", c.ep_rkey_unpack, missing) &&
         find(library, "ucp_rkey_destroy", c.rkey_destroy, missing) &&
         find(library, "ucp_put_nbx", c.put, missing) &&
         find(library, "ucp_ep_query", c.ep_query, missing) &&
         find(library, "ucs_status_string", c.status_string, missing);
}

UcxLibrary load() {
  UcxLibrary found;
  const std::string& wanted = Env::get().ucx;
  if (wanted == "off") {
    found.why_not = "EXPERTWIRE_UCX=off";
    return found;
  }
  for (const auto& [name, value] : kDefaults) set_unless_set(name, value);
  const char* name = wanted == "auto" ? "libucp.so.0" : wanted.c_str();
  void* const library = ::dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* why = ::dlerror();
    found.why_not = fmt::format("{} was not found ({})", name, why != nullptr ? why : "no reason");
    return found;
  }
  std::string missing;
  if (!find_all(library, found.calls, missing)) {
    found.why_not = fmt::format("{} has no {}", name, missing);
    return found;
  }
  unsigned major = 0, minor = 0, release = 0;
  found.calls.get_version(&major, &minor, &release);
  found.minor = minor;
  found.version = fmt::format("{}.{}.{}", major, minor, release);
  found.present = major == kOldestMajor && minor >= kOldestMinor;
  if (!found.present)
    found.why_not = fmt::format("UCX {} is not 1.13 or a later 1.x", found.version);
  return found;
}

}  // namespace

const UcxLibrary& UcxLibrary::get() {
  static const UcxLibrary library = [] {
    UcxLibrary found = load();
    if (found.present)
      log(LogLevel::debug, Subsystem::conn, "UCX {} is loaded", found.version);
    else
      log(LogLevel::debug, Subsystem::conn, "no UCX: {}", found.why_not);
    return found;
  }();
  return library;
}

}  // namespace expertwire
