#pragma once

#include <ucp/api/ucp.h>

#include <string>

namespace expertwire::inline v0 {

/// The calls of UCX that expertwire makes, found at run time, so that one binary works with all
/// versions from 1.13 on, and without any.
struct UcxCalls {
  decltype(&::ucp_get_version) get_version;
  decltype(&::ucp_config_read) config_read;
  decltype(&::ucp_config_release) config_release;
  decltype(&::ucp_init_version) init_version;
  decltype(&::ucp_cleanup) cleanup;
  decltype(&::ucp_worker_create) worker_create;
  decltype(&::ucp_worker_destroy) worker_destroy;
  decltype(&::ucp_worker_get_address) worker_get_address;
  decltype(&::ucp_worker_release_address) worker_release_address;
  decltype(&::ucp_worker_set_am_recv_handler) worker_set_am_recv_handler;
  decltype(&::ucp_worker_progress) worker_progress;
  decltype(&::ucp_ep_create) ep_create;
  decltype(&::ucp_ep_close_nbx) ep_close;
  decltype(&::ucp_ep_flush_nbx) ep_flush;
  decltype(&::ucp_am_send_nbx) am_send;
  decltype(&::ucp_request_check_status) request_check_status;
  decltype(&::ucp_request_free) request_free;
  decltype(&::ucs_status_string) status_string;
  // Of remote writes.
  decltype(&::ucp_mem_map) mem_map;
  decltype(&::ucp_mem_unmap) mem_unmap;
  decltype(&::ucp_rkey_pack) rkey_pack;
  decltype(&::ucp_rkey_buffer_release) rkey_buffer_release;
  decltype(&::ucp_ep_rkey_unpack) ep_rkey_unpack;
  decltype(&::ucp_rkey_destroy) rkey_destroy;
  decltype(&::ucp_put_nbx) put;
  decltype(&::ucp_ep_query) ep_query;
};

/// UCX as it was found, or why it was not.
struct UcxLibrary {
  UcxCalls calls{};
  bool present = false;
  std::string version;  ///< "1.13.1"
  unsigned minor = 0;
  std::string why_not;

  /// Looked for once a process, where EXPERTWIRE_UCX says. Sets variables of UCX that are unset to
  /// what suits expertwire; those that are set stay.
  static const UcxLibrary& get();
};

}  // namespace expertwire
