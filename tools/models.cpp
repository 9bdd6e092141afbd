#include "models.hpp"

#include <fmt/format.h>

#include <stdexcept>

namespace expertwire::tools {

const std::vector<ModelShape>& models() {
  static const std::vector<ModelShape> all = {
      {"deepseek-v3", 7168, 256, 8},
      {"deepseek-v4-flash", 4096, 256, 6},
      {"deepseek-v4-pro", 7168, 384, 6},
      {"deepseek-v2", 5120, 160, 6},
      {"deepseek-v2-lite", 2048, 64, 6},
      {"kimi-k2", 7168, 384, 8},
      {"kimi-k3", 3584, 896, 16},
      {"kimi-linear-48b", 2304, 256, 8},
      {"qwen3-30b-a3b", 2048, 128, 8},
      {"qwen3-235b-a22b", 4096, 128, 8},
      {"qwen3-coder-480b", 6144, 160, 8},
      {"qwen3-next-80b", 2048, 512, 10},
      {"qwen3.5-35b", 2048, 256, 8},
      {"qwen3.5-122b", 3072, 256, 8},
      {"qwen3.5-397b", 4096, 512, 10},
      {"qwen3.8-flash-next", 2560, 512, 10},
      {"qwen1.5-moe-a2.7b", 2048, 60, 4},
      {"qwen2-57b", 3584, 64, 8},
      {"glm-4.5", 5120, 160, 8},
      {"glm-4.5-air", 4096, 128, 8},
      {"glm-5", 6144, 256, 8},
      {"mixtral-8x7b", 4096, 8, 2},
      {"mixtral-8x22b", 6144, 8, 2},
      {"gpt-oss-120b", 2880, 128, 4},
      {"gpt-oss-20b", 2880, 32, 4},
      {"llama-4-scout", 5120, 16, 1},
      {"llama-4-maverick", 5120, 128, 1},
      {"minimax-m2", 3072, 256, 8},
      {"minimax-m3", 6144, 128, 4},
      {"minimax-text-01", 6144, 32, 2},
      {"mimo-v2-flash", 4096, 256, 8},
      {"step-3.7-flash", 4096, 288, 8},
      {"step-3", 7168, 48, 3},
      {"nemotron-3-nano", 2688, 128, 6},
      {"nemotron-3-super", 1024, 512, 22},
      {"nemotron-3-ultra", 2048, 512, 22},
      {"gemma-4-26b", 2816, 128, 8},
      {"olmoe", 2048, 64, 8},
      {"dots.llm1", 4096, 128, 6},
      {"hunyuan-a13b", 4096, 64, 8},
      {"dbrx", 6144, 16, 4},
      {"arctic", 7168, 128, 2},
      {"ernie-4.5-300b", 8192, 64, 8},
      {"ernie-4.5-21b", 2560, 64, 6},
      {"longcat-flash", 6144, 512, 12},
      {"granite-4-h-small", 4096, 72, 10},
      {"granite-3b-a800m", 1536, 40, 8},
      {"ling-1t", 8192, 256, 8},
      {"mistral-large-3", 7168, 128, 4},
  };
  return all;
}

const ModelShape& find_model(const std::string& name) {
  std::string names;
  for (const ModelShape& model : models()) {
    if (name == model.name) return model;
    names += fmt::format("{}{}", names.empty() ? "" : ", ", model.name);
  }
  throw std::invalid_argument(fmt::format("model '{}' must be one of {}", name, names));
}

}  // namespace expertwire::tools
