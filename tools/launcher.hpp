#pragma once

#include <string>
#include <vector>

namespace expertwire::tools {

/// Ranks to start as processes of this machine.
struct LaunchRequest {
  int ranks = 1;
  std::vector<std::string> command;  ///< program and arguments
};

/// Starts the ranks, each a process group of its own, tells each who it is through its environment,
/// and waits for all. When one fails it is named, and the others get their deadline to find out;
/// then they are ended. Ranks, and what they have started, end with this process, however it ends;
/// signals to it are passed on. Returns 0 if all ranks did, else the first failure's exit status
/// (128 + signal).
int launch(const LaunchRequest& request);

/// Replaces this process by `command`. Returns an exit status only if that fails.
int become(std::vector<std::string> command);

/// This program with the arguments that it was started with.
std::vector<std::string> own_command(int argc, char** argv);

}  // namespace expertwire::tools
