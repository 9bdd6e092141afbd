#pragma once

#include <functional>
#include <memory>
#include <string>

#include "expertwire/bootstrap.hpp"

namespace expertwire::inline v0 {

/// As bootstrap_from_rendezvous, but asks `secret` anew for every try: a file may still hold the
/// secret of a job that was killed.
std::shared_ptr<Bootstrap> join_rendezvous(const RendezvousRequest& request,
                                           const std::function<std::string()>& secret);

}  // namespace expertwire
