/// What a trained model is worth on text that it has not seen: bounds on the evidence.
#pragma once

#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include <free_transformer/evidence_bound.hpp>
#include <free_transformer/latent_code.hpp>
#include <free_transformer/token_statistics.hpp>
#include <free_transformer/vae_loss.hpp>

#include "model.hpp"
#include "text.hpp"

namespace example {

struct Evaluation {
  free_transformer::LossMetrics metrics;  // of one sample of Z a window
  free_transformer::EvidenceBound lower_bound, importance_weighted_bound;
};

/// Both bounds of the windows of a batch, each after its first byte, from some samples of the encoder's Z.
inline Evaluation evaluate(FreeTransformer& model, const Batch& batch, int64_t samples) {
  torch::NoGradGuard no_grad;
  const auto z_logits = model->posterior(batch.tokens);
  std::vector<torch::Tensor> log_likelihoods, bits;
  Evaluation result;
  for (int64_t sample = 0; sample < samples; ++sample) {
    bits.push_back(free_transformer::sample_latent_bits(z_logits));
    const auto logits = model->predict(batch.tokens, free_transformer::pack_latent_bits(bits.back()));
    log_likelihoods.push_back(free_transformer::compute_token_statistics(logits, batch.targets).target_log_probability);
    if (sample == 0) {
      const auto options = free_transformer::VAELossOptions().latent_dim(z_logits.size(-1)).kl_of_each_bit(true);
      result.metrics = free_transformer::compute_vae_loss(logits, batch.targets, z_logits, options).metrics;
    }
  }
  const auto log_likelihood = torch::stack(log_likelihoods);
  result.lower_bound = free_transformer::compute_evidence_lower_bound(log_likelihood.mean(0), z_logits);
  result.importance_weighted_bound =
      free_transformer::compute_importance_weighted_bound(log_likelihood, z_logits, torch::stack(bits));
  return result;
}

/// The same for windows that lie evenly over a text.
inline Evaluation evaluate(FreeTransformer& model, const Text& text, int64_t batch_size, int64_t batches,
                           int64_t samples) {
  Evaluation sum;
  for (int64_t index = 0; index < batches; ++index) {
    const auto part = evaluate(model, text.even_batch(batch_size, index, batches), samples);
    sum.metrics += part.metrics;
    sum.lower_bound += part.lower_bound;
    sum.importance_weighted_bound += part.importance_weighted_bound;
  }
  return sum;
}

namespace detail {

/// Standard error of a bound in bits a byte, as the windows differ.
inline double standard_error(const free_transformer::EvidenceBound& bound) {
  const auto windows = bound.nats.numel();
  if (windows < 2) return 0.0;
  const auto bytes_a_window = bound.tokens.to(torch::kFloat64).mean().item<double>();
  return bound.nats.std().item<double>() / std::sqrt(static_cast<double>(windows)) / bytes_a_window / std::log(2.0);
}

inline void print_row(const std::string& name, double bits, const std::string& note) {
  std::printf("%-36s %11.4f %11.4f   %s\n", name.c_str(), bits * std::log(2.0), bits, note.c_str());
}

inline void print_bound(const std::string& name, const free_transformer::EvidenceBound& bound) {
  char error[40];
  std::snprintf(error, sizeof error, "+- %.4f bits", standard_error(bound));
  print_row(name, bound.bits_per_byte(bound.tokens.sum().item<int64_t>()), error);
}

}  // namespace detail

/// A token is a byte here, so that bits a token are bits a byte.
inline void print(const Evaluation& evaluation, int64_t samples) {
  const auto kl_bits = evaluation.metrics.at("latent/kl_bits");
  std::printf("%-36s %11s %11s\n", "", "nats a byte", "bits a byte");
  detail::print_row("posterior cross entropy", evaluation.lower_bound.bits_per_token() - kl_bits,
                    "knows Z: not to be compared");
  detail::print_row("latent KL", kl_bits, "");
  detail::print_bound("evidence lower bound", evaluation.lower_bound);
  detail::print_bound("importance-weighted bound, K = " + std::to_string(samples),
                      evaluation.importance_weighted_bound);
  std::printf("\nKL of each latent bit, in bits a byte:");
  for (const auto& [name, value] : evaluation.metrics) {
    if (name.rfind("latent/kl_bits/", 0) == 0) std::printf(" %.4f", value);
  }
  std::printf("\n%.0f of them are active\n", evaluation.metrics.at("latent/active_bits"));
}

}  // namespace example
