#include "base/env.hpp"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <fstream>
#include <map>
#include <sstream>

#include "expertwire/error.hpp"

namespace expertwire {
namespace {

/// Sets variables for the time of a test; the library itself never writes them.
class Variables {
 public:
  explicit Variables(const std::map<std::string, std::string>& values) {
    for (const auto& [name, value] : values) {
      ::setenv(name.c_str(), value.c_str(), 1);
      names_.push_back(name);
    }
  }
  ~Variables() {
    for (const auto& name : names_) ::unsetenv(name.c_str());
  }

 private:
  std::vector<std::string> names_;
};

TEST(Env, PageInDocsIsTheCodes) {
  std::ifstream file(EXPERTWIRE_SOURCE_DIR "/docs/environment.md");
  std::stringstream text;
  text << file.rdbuf();
  EXPECT_EQ(text.str(), environment_page())
      << "write it anew with: expertwire env > docs/environment.md";
}

TEST(Env, KnowsTheLaunchers) {
  {
    Variables set({{"RANK", "3"},
                   {"WORLD_SIZE", "8"},
                   {"LOCAL_WORLD_SIZE", "8"},
                   {"MASTER_ADDR", "h"},
                   {"MASTER_PORT", "29500"}});
    const Env env = Env::read();
    EXPECT_EQ(env.launcher, "torchrun");
    EXPECT_EQ(env.rank, 3);
    EXPECT_EQ(env.size, 8);
    EXPECT_NE(env.job.find("29500"), std::string::npos);
  }
  {
    Variables set({{"OMPI_COMM_WORLD_RANK", "1"},
                   {"OMPI_COMM_WORLD_SIZE", "2"},
                   {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"},
                   {"PMIX_NAMESPACE", "job7"}});
    const Env env = Env::read();
    EXPECT_EQ(env.launcher, "mpirun");
    EXPECT_EQ(env.job, "job7");
  }
  {
    Variables set({{"SLURM_PROCID", "5"},
                   {"SLURM_NTASKS", "8"},
                   {"SLURM_TASKS_PER_NODE", "4(x2)"},
                   {"SLURM_JOB_ID", "9"},
                   {"SLURM_STEP_ID", "0"}});
    const Env env = Env::read();
    EXPECT_EQ(env.launcher, "srun");
    EXPECT_EQ(env.local_size, 4);
    EXPECT_EQ(env.job, "9.0");
  }
  EXPECT_FALSE(Env::read().rank.has_value());
}

TEST(Env, RefusesNonsenseByName) {
  auto message = [](const char* name, const char* value) -> std::string {
    Variables set(std::map<std::string, std::string>{{name, value}});
    try {
      Env::read();
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_NE(message("EXPERTWIRE_TIMEOUT_MS", "soon").find("EXPERTWIRE_TIMEOUT_MS=soon"),
            std::string::npos);
  EXPECT_NE(message("EXPERTWIRE_TIMEOUT_MS", "-1").find("from 1 to"), std::string::npos);
  Variables set({{"RANK", "8"}, {"WORLD_SIZE", "8"}});
  EXPECT_THROW(Env::read(), Error);
}

}  // namespace
}  // namespace expertwire
