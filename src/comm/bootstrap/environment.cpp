#include <unistd.h>

#include <optional>

#include "base/check.hpp"
#include "base/env.hpp"
#include "base/log.hpp"
#include "comm/bootstrap/rendezvous.hpp"
#include "comm/secret.hpp"

namespace expertwire::inline v0 {

std::shared_ptr<Bootstrap> bootstrap_from_environment() {
  const Env& env = Env::get();
  if (!env.rank) return bootstrap_in_process(1).front();

  RendezvousRequest request;
  request.rank = *env.rank;
  request.size = *env.size;
  request.timeout = std::chrono::milliseconds(env.timeout_ms);
  const bool one_host = env.rendezvous.empty();
  check(!one_host || *env.local_size == *env.size, ErrorCode::unsupported,
        "{} ranks on several hosts ({} on this one) need EXPERTWIRE_RENDEZVOUS=host:port of rank "
        "0, and EXPERTWIRE_SECRET or EXPERTWIRE_SECRET_FILE",
        *env.size, *env.local_size);
  check_argument(!one_host || !env.job.empty(),
                 "EXPERTWIRE_JOB is not set; it must be a name that the ranks of this job share "
                 "and no other job of this user has");
  const std::string name = digest_name(fmt::format("{} {} {}", ::geteuid(), env.launcher, env.job));
  request.address = one_host ? "@expertwire-" + name : env.rendezvous;

  const Deadline deadline = Deadline::after(request.timeout);
  const std::string shared_path = fmt::format("{}/expertwire-{}.secret", env.runtime_dir, name);
  std::optional<SecretFile> shared;  // gone when this function returns: all have joined by then
  std::function<std::string()> secret;
  if (!env.secret.empty()) {
    secret = [&] { return parse_secret(env.secret, "EXPERTWIRE_SECRET"); };
  } else if (!env.secret_file.empty()) {
    secret = [&] { return read_secret_file(env.secret_file, deadline); };
  } else if (!one_host) {
    throw Error(ErrorCode::refused,
                "ranks on several hosts need a shared secret: set EXPERTWIRE_SECRET or "
                "EXPERTWIRE_SECRET_FILE for all of them (`expertwire secret` makes one)");
  } else if (request.rank == 0) {
    secret = [&] { return shared.emplace(shared_path).secret(); };
  } else {
    secret = [&] { return read_secret_file(shared_path, deadline); };
  }
  log(LogLevel::debug, Subsystem::boot, "rank {} of {} ({}) joins at {}", request.rank,
      request.size, env.launcher, request.address);
  return join_rendezvous(request, secret);
}

}  // namespace expertwire
