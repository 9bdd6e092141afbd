#include "comm/transport/ucx/engine.hpp"

#include <sys/socket.h>

#include <array>
#include <chrono>
#include <filesystem>
#include <map>
#include <mutex>
#include <string_view>
#include <utility>

#include "base/check.hpp"
#include "base/env.hpp"
#include "comm/transport/ucx/library.hpp"

namespace expertwire::inline v0 {

namespace {

constexpr unsigned kMessageId = 0x65;
// Of the sizes tried over TCP, up to which a message is moved without being cut by the engine.
constexpr std::size_t kMessageBytes = 57344;
constexpr std::chrono::milliseconds kMostClosing{300};

const UcxCalls& ucx() { return UcxLibrary::get().calls; }

void check_ucx(ucs_status_t status, const char* call) {
  check(status == UCS_OK, ErrorCode::system, "{} of UCX {} failed: {}", call,
        UcxLibrary::get().version, ucx().status_string(status));
}

bool may_write_remotely() {
  const std::string& wanted = Env::get().remote_writes;
  if (wanted != "auto") return wanted == "on";
  static const bool rdma = [] {
    std::error_code none;
    const std::filesystem::directory_iterator devices("/sys/class/infiniband", none);
    return !none && devices != std::filesystem::directory_iterator();
  }();
  return rdma;
}

/// The names of an endpoint's transports as UCX reports them from 1.14 on; the headers may be
/// older.
struct TransportsOfEndpoint {
  struct Entry {
    const char* transport;
    const char* device;
  };
  static constexpr std::uint64_t kField = 1 << 3;
  static constexpr unsigned kMost = 16, kOldestMinor = 14;

  std::uint64_t field_mask = kField;
  char name[UCP_ENTITY_NAME_MAX];
  sockaddr_storage local, remote;
  Entry* entries;
  unsigned count;
  std::size_t entry_size = sizeof(Entry);
  std::array<std::uint64_t, 16> later{};  // what newer versions have behind
};

/// Whether an endpoint has native remote writes: rc, dc or srd.
bool has_native_writes(ucp_ep_h endpoint) {
  if (UcxLibrary::get().minor < TransportsOfEndpoint::kOldestMinor) return false;
  std::array<TransportsOfEndpoint::Entry, TransportsOfEndpoint::kMost> entries{};
  TransportsOfEndpoint query{};
  query.entries = entries.data();
  query.count = TransportsOfEndpoint::kMost;
  if (ucx().ep_query(endpoint, reinterpret_cast<ucp_ep_attr_t*>(&query)) != UCS_OK) return false;
  for (unsigned i = 0; i < query.count; ++i)
    for (const std::string_view native : {"rc", "dc", "srd"})
      if (std::string_view(entries[i].transport).starts_with(native)) return true;
  return false;
}

/// Of a communicator.
class UcxContext {
 public:
  explicit UcxContext(int ranks) {
    ucp_config_t* config = nullptr;
    check_ucx(ucx().config_read(nullptr, nullptr, &config), "ucp_config_read");
    ucp_params_t params{};
    params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_MT_WORKERS_SHARED |
                        UCP_PARAM_FIELD_ESTIMATED_NUM_EPS;
    // Lanes for remote writes are made only where there may be use for them.
    params.features = UCP_FEATURE_AM | (may_write_remotely() ? UCP_FEATURE_RMA : 0);
    params.mt_workers_shared = 1;
    params.estimated_num_eps = static_cast<std::size_t>(ranks);
    const ucs_status_t status =
        ucx().init_version(UCP_API_MAJOR, UCP_API_MINOR, &params, config, &context_);
    ucx().config_release(config);
    check_ucx(status, "ucp_init");
  }
  UcxContext(const UcxContext&) = delete;
  UcxContext& operator=(const UcxContext&) = delete;
  ~UcxContext() {
    for (ucp_mem_h memory : mapped_) ucx().mem_unmap(context_, memory);
    ucx().cleanup(context_);
  }
  ucp_context_h get() const { return context_; }

  /// Registers memory with the network until the end; what peers need to write to it.
  std::string make_key(void* data, std::size_t bytes) {
    if (!may_write_remotely() || bytes == 0) return {};
    ucp_mem_map_params_t params{};
    params.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH;
    params.address = data;
    params.length = bytes;
    ucp_mem_h memory = nullptr;
    std::lock_guard lock(mutex_);
    check_ucx(ucx().mem_map(context_, &params, &memory), "ucp_mem_map");
    mapped_.push_back(memory);
    void* buffer = nullptr;
    std::size_t length = 0;
    check_ucx(ucx().rkey_pack(context_, memory, &buffer, &length), "ucp_rkey_pack");
    std::string key(static_cast<const char*>(buffer), length);
    ucx().rkey_buffer_release(buffer);
    return key;
  }

 private:
  ucp_context_h context_ = nullptr;
  std::mutex mutex_;
  std::vector<ucp_mem_h> mapped_;
};

/// A worker, and the endpoints from it to the workers of peers. Endpoints are made at the first
/// message, from either side; a peer's messages arrive without one.
class UcxEngine final : public Engine {
 public:
  explicit UcxEngine(std::shared_ptr<UcxContext> context) : context_(std::move(context)) {
    ucp_worker_params_t params{};
    params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
    params.thread_mode = UCS_THREAD_MODE_SERIALIZED;  // the proxy's thread, or the poller's
    check_ucx(ucx().worker_create(context_->get(), &params, &worker_), "ucp_worker_create");
    try {
      prepare();
    } catch (...) {
      ucx().worker_destroy(worker_);
      throw;
    }
  }
  ~UcxEngine() override {
    client_ = nullptr;
    leave();
    ucx().worker_destroy(worker_);
  }

  const std::string& address() const override { return address_; }
  std::size_t message_bytes() const override { return kMessageBytes; }
  void set_client(Client* client) override { client_ = client; }
  void set_address(int peer, std::string address) override {
    Peer& p = peers_[peer];
    p.engine = this;
    p.rank = peer;
    p.address = std::move(address);
  }
  void send(int peer, const Piece* pieces, int count, void* token) override;
  bool writes_remotely(int peer) override;
  std::string make_key(void* data, std::size_t bytes) override {
    return context_->make_key(data, bytes);
  }
  void put(int peer, const Piece& piece, std::uint64_t address, const std::string& key,
           void* token) override;
  void flush(int peer, void* token) override;
  bool progress() override;
  void drop(int peer) noexcept override;

 private:
  struct Peer {
    UcxEngine* engine = nullptr;
    int rank = -1;
    std::string address;
    ucp_ep_h endpoint = nullptr;
    std::map<std::string, ucp_rkey_h> keys;  ///< unpacked for the endpoint
    bool broken = false;  ///< UCX has said so; the endpoint is closed in the next progress()
    std::string why;
  };
  struct Sending {
    Peer* peer;
    void* token;
    ucp_dt_iov_t pieces[kMostPieces];
  };

  void prepare();
  bool connect(Peer& peer);
  Sending* start(int rank, void* token);
  static ucp_request_param_t parameters(Sending* sending);
  void follow(Sending* sending, ucs_status_ptr_t request);
  static void drop_keys(Peer& peer) noexcept;
  void break_off(Peer& peer, ucs_status_t status) noexcept;
  void finish(Sending* sending) noexcept;
  void close_broken();
  void leave() noexcept;
  template <class Start>
  void settle(Start start) noexcept;

  static ucs_status_t on_message(void* self, const void*, std::size_t, void* data,
                                 std::size_t bytes, const ucp_am_recv_param_t* param);
  static void on_sent(void* request, ucs_status_t status, void* sending);
  static void on_error(void* peer, ucp_ep_h, ucs_status_t status);

  std::shared_ptr<UcxContext> context_;
  ucp_worker_h worker_ = nullptr;
  std::string address_;
  Client* client_ = nullptr;
  std::map<int, Peer> peers_;
  std::vector<std::unique_ptr<Sending>> made_;
  std::vector<Sending*> free_;
  std::vector<void*> closing_;  ///< requests of closes that are under way
  bool some_broken_ = false;
};

void UcxEngine::prepare() {
  ucp_am_handler_param_t handler{};
  handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                       UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  handler.id = kMessageId;
  handler.flags = UCP_AM_FLAG_WHOLE_MSG;
  handler.cb = on_message;
  handler.arg = this;
  check_ucx(ucx().worker_set_am_recv_handler(worker_, &handler), "ucp_worker_set_am_recv_handler");
  ucp_address_t* address = nullptr;
  std::size_t bytes = 0;
  check_ucx(ucx().worker_get_address(worker_, &address, &bytes), "ucp_worker_get_address");
  address_.assign(reinterpret_cast<const char*>(address), bytes);
  ucx().worker_release_address(worker_, address);
}

bool UcxEngine::connect(Peer& peer) {
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                      UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.address = reinterpret_cast<const ucp_address_t*>(peer.address.data());
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler = {on_error, &peer};
  const ucs_status_t status = ucx().ep_create(worker_, &params, &peer.endpoint);
  if (status == UCS_OK) return true;
  peer.endpoint = nullptr;
  break_off(peer, status);
  return false;
}

/// What stands for one request while it is under way; null if the peer cannot be reached, and it
/// has come back at once.
UcxEngine::Sending* UcxEngine::start(int rank, void* token) {
  Peer& peer = peers_[rank];
  if (free_.empty()) {
    made_.push_back(std::make_unique<Sending>());
    free_.push_back(made_.back().get());
  }
  Sending* const sending = free_.back();
  free_.pop_back();
  *sending = {&peer, token, {}};
  if (!peer.broken && (peer.endpoint != nullptr || connect(peer))) return sending;
  finish(sending);
  return nullptr;
}

ucp_request_param_t UcxEngine::parameters(Sending* sending) {
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.cb.send = on_sent;
  param.user_data = sending;
  return param;
}

/// A request that was made is done, has failed, or comes back by on_sent().
void UcxEngine::follow(Sending* sending, ucs_status_ptr_t request) {
  if (UCS_PTR_IS_PTR(request)) return;
  if (UCS_PTR_IS_ERR(request)) break_off(*sending->peer, UCS_PTR_STATUS(request));
  finish(sending);
}

void UcxEngine::send(int rank, const Piece* pieces, int count, void* token) {
  Sending* const sending = start(rank, token);
  if (sending == nullptr) return;
  for (int i = 0; i < count; ++i)
    sending->pieces[i] = {const_cast<void*>(pieces[i].data), pieces[i].bytes};
  ucp_request_param_t param = parameters(sending);
  param.op_attr_mask |= UCP_OP_ATTR_FIELD_DATATYPE | UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_AM_SEND_FLAG_EAGER;
  const bool one = count == 1;
  param.datatype = one ? ucp_dt_make_contig(1) : ucp_dt_make_iov();
  follow(sending, ucx().am_send(sending->peer->endpoint, kMessageId, nullptr, 0,
                                one ? pieces[0].data : sending->pieces,
                                one ? pieces[0].bytes : static_cast<std::size_t>(count), &param));
}

bool UcxEngine::writes_remotely(int rank) {
  if (!may_write_remotely()) return false;
  Peer& peer = peers_[rank];
  if (peer.broken || (peer.endpoint == nullptr && !connect(peer))) return false;
  const bool native = has_native_writes(peer.endpoint);
  return native || Env::get().remote_writes == "on";
}

void UcxEngine::put(int rank, const Piece& piece, std::uint64_t address, const std::string& key,
                    void* token) {
  Sending* const sending = start(rank, token);
  if (sending == nullptr) return;
  Peer& peer = *sending->peer;
  ucp_rkey_h& unpacked = peer.keys[key];
  if (unpacked == nullptr) {
    const ucs_status_t status = ucx().ep_rkey_unpack(peer.endpoint, key.data(), &unpacked);
    if (status != UCS_OK) {
      break_off(peer, status);
      return finish(sending);
    }
  }
  const ucp_request_param_t param = parameters(sending);
  follow(sending, ucx().put(peer.endpoint, piece.data, piece.bytes, address, unpacked, &param));
}

/// Of this endpoint alone: other peers' puts go on.
void UcxEngine::flush(int rank, void* token) {
  Sending* const sending = start(rank, token);
  if (sending == nullptr) return;
  const ucp_request_param_t param = parameters(sending);
  follow(sending, ucx().ep_flush(sending->peer->endpoint, &param));
}

void UcxEngine::finish(Sending* sending) noexcept {
  const int rank = sending->peer->rank;
  void* const token = sending->token;
  free_.push_back(sending);
  if (client_ != nullptr) client_->sent(rank, token);
}

bool UcxEngine::progress() {
  const bool moved = ucx().worker_progress(worker_) != 0;
  if (some_broken_) close_broken();
  std::erase_if(closing_, [](void* request) {
    if (ucx().request_check_status(request) == UCS_INPROGRESS) return false;
    ucx().request_free(request);
    return true;
  });
  return moved;
}

/// The client is told when the call in which it was found is over, and the endpoint closed.
void UcxEngine::break_off(Peer& peer, ucs_status_t status) noexcept {
  if (peer.broken) return;
  peer.broken = true;
  some_broken_ = true;
  try {
    peer.why = ucx().status_string(status);
  } catch (const std::exception&) {
    peer.why.clear();
  }
}

void UcxEngine::close_broken() {
  some_broken_ = false;
  for (auto& [rank, peer] : peers_) {
    if (!peer.broken || peer.address.empty()) continue;
    drop(rank);
    if (client_ != nullptr) client_->lost(rank, peer.why);
  }
}

void UcxEngine::drop_keys(Peer& peer) noexcept {
  for (auto& [text, key] : peer.keys)
    if (key != nullptr) ucx().rkey_destroy(key);
  peer.keys.clear();
}

/// A forced close gives back what is under way at once.
void UcxEngine::drop(int rank) noexcept {
  Peer& peer = peers_[rank];
  peer.broken = true;
  peer.address.clear();  // it has been told
  if (peer.endpoint == nullptr) return;
  drop_keys(peer);
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_EP_CLOSE_FLAG_FORCE;
  const ucs_status_ptr_t request = ucx().ep_close(peer.endpoint, &param);
  if (UCS_PTR_IS_PTR(request)) closing_.push_back(request);
  peer.endpoint = nullptr;
}

/// Starts a request for every endpoint and makes progress until all are done, for a while.
template <class Start>
void UcxEngine::settle(Start start) noexcept {
  std::vector<void*> requests;
  for (auto& [rank, peer] : peers_)
    if (peer.endpoint != nullptr)
      if (void* request = start(peer); UCS_PTR_IS_PTR(request)) requests.push_back(request);
  const auto until = std::chrono::steady_clock::now() + kMostClosing;
  while (!requests.empty() && std::chrono::steady_clock::now() < until) {
    ucx().worker_progress(worker_);
    std::erase_if(requests, [](void* request) {
      if (ucx().request_check_status(request) == UCS_INPROGRESS) return false;
      ucx().request_free(request);
      return true;
    });
  }
  for (void* request : requests) ucx().request_free(request);
}

void UcxEngine::leave() noexcept {
  settle([](Peer& peer) -> void* {
    ucp_request_param_t param{};
    return peer.broken ? nullptr : ucx().ep_flush(peer.endpoint, &param);
  });
  for (auto& [rank, peer] : peers_) drop_keys(peer);
  settle([](Peer& peer) -> void* {
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = UCP_EP_CLOSE_FLAG_FORCE;
    return ucx().ep_close(std::exchange(peer.endpoint, nullptr), &param);
  });
  for (void* request : closing_) ucx().request_free(request);
}

ucs_status_t UcxEngine::on_message(void* self, const void*, std::size_t, void* data,
                                   std::size_t bytes, const ucp_am_recv_param_t* param) {
  auto* const engine = static_cast<UcxEngine*>(self);
  // None of ours asks before it is sent; what a stranger offers is not fetched.
  const bool here = (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) == 0;
  if (engine->client_ != nullptr && here)
    engine->client_->received(static_cast<const std::byte*>(data), bytes);
  return UCS_OK;
}

void UcxEngine::on_sent(void* request, ucs_status_t status, void* sending) {
  auto* const done = static_cast<Sending*>(sending);
  UcxEngine& engine = *done->peer->engine;
  if (status != UCS_OK && status != UCS_ERR_CANCELED) engine.break_off(*done->peer, status);
  ucx().request_free(request);
  engine.finish(done);
}

void UcxEngine::on_error(void* peer, ucp_ep_h, ucs_status_t status) {
  auto* const broken = static_cast<Peer*>(peer);
  broken->engine->break_off(*broken, status);
}

}  // namespace

const UcxPresence& ucx_presence() {
  static const UcxPresence presence{UcxLibrary::get().present, UcxLibrary::get().version,
                                    UcxLibrary::get().why_not};
  return presence;
}

std::vector<std::unique_ptr<Engine>> make_ucx_engines(int count, int ranks) {
  const auto context = std::make_shared<UcxContext>(ranks);
  std::vector<std::unique_ptr<Engine>> engines;
  for (int i = 0; i < count; ++i) engines.push_back(std::make_unique<UcxEngine>(context));
  return engines;
}

}  // namespace expertwire
