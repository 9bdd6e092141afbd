#include "comm/transport/transport.hpp"

namespace expertwire::inline v0 {

std::vector<std::unique_ptr<Transport>> make_transports() {
  std::vector<std::unique_ptr<Transport>> all;
  all.push_back(make_loopback_transport());
  all.push_back(make_shm_transport());
  if (auto cuda = make_cuda_ipc_transport()) all.push_back(std::move(cuda));
  if (auto staged = make_staged_transport()) all.push_back(std::move(staged));
  if (auto ucx = make_ucx_transport()) all.push_back(std::move(ucx));
  return all;
}

}  // namespace expertwire
