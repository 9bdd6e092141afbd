#pragma once

namespace expertwire::tools {

/// Looks at this machine and says what expertwire will use, why, and what is wrong. Returns 1 if
/// something is.
int run_doctor(bool measure);

}  // namespace expertwire::tools
