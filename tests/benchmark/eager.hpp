/// The losses as they are written today: the baselines.
#pragma once

#include <torch/torch.h>

#include <cmath>
#include <cstdint>

namespace benchmarks::eager {

using torch::Tensor;

inline Tensor cross_entropy(const Tensor& logits, const Tensor& targets,
                            const torch::nn::functional::CrossEntropyFuncOptions& options = {}) {
  return torch::nn::functional::cross_entropy(logits, targets, options);
}

inline Tensor cross_entropy_with_z_loss(const Tensor& logits, const Tensor& targets, double z_loss) {
  return cross_entropy(logits, targets) + z_loss * logits.logsumexp(-1).square().mean();
}

inline Tensor capped_cross_entropy(const Tensor& logits, const Tensor& targets, double cap) {
  return cross_entropy(cap * (logits / cap).tanh(), targets);
}

/// The seed's formula.
inline Tensor kl_divergence(const Tensor& z_logits, double free_bits) {
  constexpr double epsilon = 1e-10;
  const Tensor p = z_logits.sigmoid();
  const Tensor kl = (p * (p + epsilon).log() + (1 - p) * (1 - p + epsilon).log() + std::log(2.0)).sum(-1);
  return (kl - free_bits).relu().mean();
}

}  // namespace benchmarks::eager
