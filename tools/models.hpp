#pragma once

#include <string>
#include <vector>

#include "expertwire/shape.hpp"

namespace expertwire::tools {

/// Published shape of a model's MoE layers.
struct ModelShape {
  const char* name;
  int hidden;  ///< elements of a row on the wire
  int experts;
  int top_k;
};

const std::vector<ModelShape>& models();
/// Throws std::invalid_argument that lists the names.
const ModelShape& find_model(const std::string& name);

}  // namespace expertwire::tools
