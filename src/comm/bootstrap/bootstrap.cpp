#include "expertwire/bootstrap.hpp"

#include <algorithm>
#include <cstring>

#include "base/check.hpp"

namespace expertwire::inline v0 {

void Bootstrap::barrier(Deadline deadline) {
  std::vector<char> tokens(static_cast<std::size_t>(size()));
  all_gather(tokens.data(), 1, deadline);
}

void Bootstrap::broadcast(void* data, std::size_t bytes, int root, Deadline deadline) {
  check_argument(root >= 0 && root < size(), "broadcast: root is {}; it must be from 0 to {}", root,
                 size() - 1);
  check_argument(data != nullptr || bytes == 0, "broadcast: data is null, for {} bytes", bytes);
  if (bytes == 0) return barrier(deadline);
  std::vector<char> all(static_cast<std::size_t>(size()) * bytes);
  if (rank() == root) std::memcpy(all.data() + static_cast<std::size_t>(root) * bytes, data, bytes);
  all_gather(all.data(), bytes, deadline);
  std::memcpy(data, all.data() + static_cast<std::size_t>(root) * bytes, bytes);
}

namespace {

class CallbackBootstrap final : public Bootstrap {
 public:
  explicit CallbackBootstrap(CallbackRequest request) : request_(std::move(request)) {}
  int rank() const noexcept override { return request_.rank; }
  int size() const noexcept override { return request_.size; }
  std::string_view kind() const noexcept override { return "callback"; }
  void all_gather(void* data, std::size_t bytes_per_rank, Deadline deadline) override {
    request_.all_gather(data, bytes_per_rank, deadline);
  }

 private:
  CallbackRequest request_;
};

}  // namespace

std::shared_ptr<Bootstrap> bootstrap_from_callback(CallbackRequest request) {
  check_argument(request.size >= 1 && request.rank >= 0 && request.rank < request.size,
                 "bootstrap_from_callback: rank {} of size {}; it must be 0 <= rank < size",
                 request.rank, request.size);
  check_argument(static_cast<bool>(request.all_gather),
                 "bootstrap_from_callback: all_gather is empty; it must be a function");
  return std::make_shared<CallbackBootstrap>(std::move(request));
}

}  // namespace expertwire
