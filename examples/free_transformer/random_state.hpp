/// The state of the generator that LibTorch draws from where none is given.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <mutex>

namespace example {

inline torch::Tensor random_state() {
  auto generator = at::detail::getDefaultCPUGenerator();
  const std::lock_guard<std::mutex> lock(generator.mutex());
  return generator.get_state();
}

inline void set_random_state(const torch::Tensor& state) {
  auto generator = at::detail::getDefaultCPUGenerator();
  const std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_state(state);
}

/// Draws from a seed of its own, and leaves the generator as it was found.
class RandomStateGuard {
 public:
  explicit RandomStateGuard(uint64_t seed) : state_(random_state()) { torch::manual_seed(seed); }
  RandomStateGuard(const RandomStateGuard&) = delete;
  RandomStateGuard& operator=(const RandomStateGuard&) = delete;
  ~RandomStateGuard() { set_random_state(state_); }

 private:
  torch::Tensor state_;
};

}  // namespace example
