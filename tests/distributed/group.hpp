/// The group of a test's ranks, and what stands between it and the losses to count or to break its messages.
#pragma once

// Debian's CMake package defines it, the wheel's users do: without it c10d's header is empty.
#ifndef USE_C10D_GLOO
#define USE_C10D_GLOO
#endif
#include <torch/csrc/distributed/c10d/FileStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

namespace ranks {

inline int number(const char* variable, int otherwise) {
  const char* const text = std::getenv(variable);
  return text == nullptr ? otherwise : std::atoi(text);
}

/// A c10d::ProcessGroup in LibTorch 1.13, a c10d::Backend in LibTorch 2.
using Group = c10::intrusive_ptr<c10d::ProcessGroupGloo>;

/// All ranks that launch_ranks has started. Every wait ends after SECONDS_OF_GROUP.
inline const Group& group() {
  static const Group all = [] {
    const std::chrono::milliseconds timeout = std::chrono::seconds(number("SECONDS_OF_GROUP", 20));
    const auto options = c10d::ProcessGroupGloo::Options::create(timeout);
    options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1"));
    const int size = number("WORLD_SIZE", 1);
    const auto store = c10::make_intrusive<c10d::FileStore>(std::getenv("MEETING_FILE"), size);
    store->setTimeout(timeout);
    return c10::make_intrusive<c10d::ProcessGroupGloo>(store, number("RANK", 0), size, options);
  }();
  return all;
}

inline int rank() { return number("RANK", 0); }
inline int size() { return number("WORLD_SIZE", 1); }

/// A stand-in for a group that knows what went through it. It may end this process before one of the messages.
class WatchedGroup {
 public:
  int getRank() const { return group()->getRank(); }
  int getSize() const { return group()->getSize(); }

  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions& options) {
    add(tensors[0].nbytes());
    return group()->allreduce(tensors, options);
  }
  c10::intrusive_ptr<c10d::Work> allgather(std::vector<std::vector<at::Tensor>>& outputs,
                                           std::vector<at::Tensor>& inputs) {
    ++gathers;
    add(inputs[0].nbytes());
    return group()->allgather(outputs, inputs);
  }

  std::vector<size_t> bytes;  ///< of each message that this rank has given
  int gathers = 0;
  int killed_before = -1;

 private:
  void add(size_t size) {
    if (static_cast<int>(bytes.size()) == killed_before) std::raise(SIGKILL);
    bytes.push_back(size);
  }
};

/// A stand-in for the group of one rank: no message goes anywhere.
class Alone {
 public:
  struct Done {
    void wait() const {}
  };
  int getRank() const { return 0; }
  int getSize() const { return 1; }
  std::unique_ptr<Done> allreduce(std::vector<at::Tensor>&, const c10d::AllreduceOptions&) {
    return std::make_unique<Done>();
  }
  std::unique_ptr<Done> allgather(std::vector<std::vector<at::Tensor>>& outputs, std::vector<at::Tensor>& inputs) {
    outputs[0][0].copy_(inputs[0]);
    return std::make_unique<Done>();
  }
};

}  // namespace ranks
