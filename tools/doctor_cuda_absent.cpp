#include "doctor_findings.hpp"

namespace expertwire::tools {

void examine_gpus(Findings& findings, bool) {
  findings.section("CUDA backend");
  findings.fact("absent", "this build has no CUDA: nvcc was not found when it was built");
}

}  // namespace expertwire::tools
