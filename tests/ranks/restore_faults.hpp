#pragma once

#include "ep/protocol/faults.hpp"

namespace expertwire::test {

/// Undoes what a test chose of faults, delays and stopped ranks.
struct RestoreFaults {
  ~RestoreFaults() {
    ep::remove_part(ep::Fault::none);
    ep::set_delays(0, 1);
    ep::stop_rank(-1, -1);
  }
};

}  // namespace expertwire::test
