#include "common.hpp"
#include "expertwire/version.hpp"

NB_MODULE(_native, module) {
  using namespace expertwire::python;
  module.doc() = "The bindings of expertwire's C++ library; use the package expertwire.";
  module.attr("__version__") = expertwire::kVersion;
  nanobind::set_leak_warnings(false);  // objects may be left to the end of the program
  bind_errors(module);
  bind_communicator(module);
  bind_objects(module);
  bind_high_throughput(module);
  bind_low_latency(module);
}
