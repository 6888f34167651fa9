// Starts a program once for each rank, and waits for all of them: launch_ranks RANKS SECONDS [--killed RANK] PROGRAM
// ARGUMENTS... Each finds RANK, WORLD_SIZE and MEETING_FILE in its environment. Fails if one of them does, or is not
// done after so many seconds, when all are killed; a rank that is named as killed must have been killed: by itself, or
// here where it has stopped itself and all others are done.
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

namespace {

struct Process {
  pid_t id = 0;
  std::string output;  ///< the file that has it
  bool has_ended = false;
  int status = 0;
};

Process start(char** command, const std::string& folder, int rank, int ranks) {
  setenv("RANK", std::to_string(rank).c_str(), 1);
  setenv("WORLD_SIZE", std::to_string(ranks).c_str(), 1);
  setenv("MEETING_FILE", (folder + "/meeting").c_str(), 1);
  Process process;
  process.output = folder + "/output_" + std::to_string(rank);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 1, process.output.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
  posix_spawn_file_actions_adddup2(&actions, 1, 2);
  if (posix_spawn(&process.id, command[0], &actions, nullptr, command, environ) != 0) {
    std::cerr << "cannot start " << command[0] << "\n";
    process.has_ended = true, process.status = -1;
  }
  posix_spawn_file_actions_destroy(&actions);
  return process;
}

/// False if some have not ended in time; they are killed, as is one that has stopped once no other runs.
bool wait_for(std::vector<Process>& processes, std::chrono::seconds limit) {
  const auto end = std::chrono::steady_clock::now() + limit;
  const auto some_run = [&] {
    bool result = false;
    for (Process& process : processes) {
      process.has_ended = process.has_ended || waitpid(process.id, &process.status, WNOHANG | WUNTRACED) == process.id;
      result = result || !process.has_ended;
    }
    return result;
  };
  while (some_run() && std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  bool all_have_ended = true;
  for (Process& process : processes) {
    if (process.has_ended && !WIFSTOPPED(process.status)) continue;
    all_have_ended = all_have_ended && process.has_ended;
    kill(process.id, SIGKILL);
    waitpid(process.id, &process.status, 0);
  }
  return all_have_ended;
}

}  // namespace

int main(int count, char** arguments) {
  const int ranks = count > 2 ? std::atoi(arguments[1]) : 0, seconds = count > 2 ? std::atoi(arguments[2]) : 0;
  int place = 3, killed = -1;
  if (count > 5 && std::string(arguments[3]) == "--killed") killed = std::atoi(arguments[4]), place = 5;
  if (ranks < 1 || seconds < 1 || place >= count) {
    std::cerr << "usage: launch_ranks RANKS SECONDS [--killed RANK] PROGRAM ARGUMENTS...\n";
    return 2;
  }
  const char* const parent = std::getenv("TMPDIR");
  std::string folder = std::string(parent ? parent : "/tmp") + "/ranks_XXXXXX";
  if (mkdtemp(folder.data()) == nullptr) return std::perror("mkdtemp"), 2;
  std::vector<Process> processes;
  processes.reserve(static_cast<size_t>(ranks));
  for (int rank = 0; rank < ranks; ++rank) processes.push_back(start(arguments + place, folder, rank, ranks));
  bool is_good = wait_for(processes, std::chrono::seconds(seconds));
  if (!is_good) std::cout << "killed after " << seconds << " s\n";
  for (int rank = 0; rank < ranks; ++rank) {
    const Process& process = processes[static_cast<size_t>(rank)];
    const bool is_killed = WIFSIGNALED(process.status) && WTERMSIG(process.status) == SIGKILL;
    const bool is_as_expected = rank == killed ? is_killed : process.status == 0;
    is_good = is_good && is_as_expected;
    std::cout << "rank " << rank << " of " << ranks << (is_as_expected ? "" : " FAILED") << ":\n"
              << std::ifstream(process.output).rdbuf();
    std::cout.clear();  // an empty file is an error to this stream
    std::remove(process.output.c_str());
  }
  std::remove((folder + "/meeting").c_str());
  rmdir(folder.c_str());
  return is_good ? 0 : 1;
}
