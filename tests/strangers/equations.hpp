/// The two terms of the loss as a trainer writes them with what LibTorch has, for tensors of float64.
#pragma once

#include <ATen/ATen.h>
#include <torch/nn/functional/loss.h>

/// A copy of float64 that starts a graph of its own.
inline at::Tensor exact_leaf(const at::Tensor& values) {
  return values.detach().to(at::kDouble).clone().requires_grad_();
}

/// F::cross_entropy of logits [..., classes], averaged over the targets that are not ignored.
inline at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& targets, int64_t ignore_index = -100) {
  return torch::nn::functional::cross_entropy(
      logits.flatten(0, -2), targets.flatten(),
      torch::nn::functional::CrossEntropyFuncOptions().ignore_index(ignore_index));
}

/// KL of each bit from a prior, sum over both values of p log(p / r).
inline at::Tensor kl_of_bits(const at::Tensor& z_logits, const at::Tensor& prior_logits) {
  return z_logits.sigmoid() * (at::log_sigmoid(z_logits) - at::log_sigmoid(prior_logits)) +
         (-z_logits).sigmoid() * (at::log_sigmoid(-z_logits) - at::log_sigmoid(-prior_logits));
}

/// max(0, sum over the bits of KL - free_bits) of each position, Eq. 5.
inline at::Tensor kl_above(const at::Tensor& z_logits, double free_bits, const at::Tensor& prior_logits = {}) {
  const at::Tensor prior = prior_logits.defined() ? prior_logits : at::zeros_like(z_logits);
  const at::Tensor above = kl_of_bits(z_logits, prior).sum(-1) - free_bits;
  return above.masked_fill(above < 0, 0);
}
