/// What each unit of this program computes, compiled with flags of its own.
#pragma once

#include <ATen/ATen.h>

#include <cstddef>
#include <string>
#include <vector>

struct Inputs {
  at::Tensor logits, targets, z_logits, hidden, weight;
};

/// The order of the numbers that a unit makes: a loss, its gradients, then the next loss.
enum Number : size_t {
  reconstruction,
  of_logits,
  inplace,
  inplace_of_logits,
  options,
  options_of_logits,
  head,
  of_hidden,
  of_weight,
  kl,
  of_z,
  per_bit,
  per_bit_of_z,
  vae,
  vae_of_logits,
  vae_of_z,
  token_loss,
  token_entropy,
  token_log_sum_exp,
  metric_total,
  metric_kl,
  metric_kl_bits,
  metric_elbo
};

/// Every number that a unit makes of the inputs, and the texts of what it refuses.
struct Outcome {
  std::vector<at::Tensor> numbers;
  std::vector<std::string> refusals;
};

/// How a unit was compiled, and its function.
struct Unit {
  std::string flags;
  Outcome (*run)(const Inputs&);
};

/// Units announce themselves while the program starts.
std::vector<Unit>& units();
