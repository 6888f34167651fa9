/// The whole training loss of the Free Transformer, and the figures to log beside it.
#pragma once

#include <ATen/ATen.h>
#include <torch/arg.h>

#include <cstdint>
#include <type_traits>
#include <variant>

#include "free_transformer/detail/checks.hpp"
#include "free_transformer/kl_divergence.hpp"
#include "free_transformer/loss_metrics.hpp"
#include "free_transformer/reconstruction_loss.hpp"

namespace free_transformer {

/// Options of `compute_vae_loss`: those of both terms, their balance, and shortcuts to the most used ones.
struct VAELossOptions {
  VAELossOptions& latent_dim(int64_t value) { return kl_.latent_dim(value), *this; }
  VAELossOptions& free_bits(double value) { return kl_.free_bits(value), *this; }
  VAELossOptions& ignore_index(int64_t value) { return reconstruction_.ignore_index(value), *this; }
  VAELossOptions& accuracy(bool value) { return reconstruction_.accuracy(value), *this; }
  int64_t latent_dim() const { return kl_.latent_dim(); }
  double free_bits() const { return kl_.free_bits(); }
  int64_t ignore_index() const { return reconstruction_.ignore_index(); }
  bool accuracy() const { return reconstruction_.accuracy(); }

  /// The options of the reconstruction term.
  TORCH_ARG(ReconstructionLossOptions, reconstruction);

  /// The options of the latent term.
  TORCH_ARG(KLDivergenceOptions, kl);

  /// beta >= 0, the weight of the latent term. Default: 1.
  TORCH_ARG(double, beta_kl) = 1.0;

  /// False (default): every position of z_logits counts in the latent term. True: only where the target counts, that
  /// is, is not ignored and has no weight of 0; z_logits then has the positions of the targets.
  TORCH_ARG(bool, mask_ignored_latents) = false;
};

struct VAELossOutput {
  torch::Tensor loss;
  LossMetrics metrics;
};

namespace detail {

/// The options of the latent term with weight 0 where the target does not count.
inline KLDivergenceOptions masked_like_targets(const char* function, const VAELossOptions& options,
                                               const torch::Tensor& targets, const torch::Tensor& z_logits) {
  const auto& reconstruction = options.reconstruction();
  const bool has_probabilities = targets.is_floating_point();
  torch::Tensor counts = has_probabilities ? at::ones(targets.sizes().slice(0, static_cast<size_t>(targets.dim() - 1)),
                                                      targets.options().dtype(at::kBool))
                                           : targets != reconstruction.ignore_index();
  if (reconstruction.token_weight().defined()) counts = counts & (reconstruction.token_weight() != 0);
  TORCH_CHECK(z_logits.dim() == counts.dim() + 1 &&
                  z_logits.sizes().slice(0, static_cast<size_t>(counts.dim())) == counts.sizes(),
              function, ": z_logits must have the positions of the targets with mask_ignored_latents, ", counts.sizes(),
              ", got shape ", z_logits.sizes());
  const torch::Tensor& weight = options.kl().token_weight();
  if (weight.defined()) {
    TORCH_CHECK(weight.sizes() == counts.sizes(), function,
                ": kl().token_weight must have one value for each position, ", "shape ", counts.sizes(), ", got ",
                weight.sizes());
    return KLDivergenceOptions(options.kl()).token_weight(weight.masked_fill(~counts, 0));
  }
  return KLDivergenceOptions(options.kl()).token_weight(counts);
}

}  // namespace detail

/// The training loss, L = reconstruction + beta_kl latent, in nats. Fleuret 2025, Eq. 5.
/// logits, targets  as in `compute_reconstruction_loss`
/// z_logits         as in `compute_kl_divergence`: the encoder's logits of the latent bits, [..., latent_dim]
/// Returns          {loss, metrics}: the loss with its graph, the metrics without one, both on the device
/// Saved            what both terms save
/// Throws           c10::Error as both terms do, if beta_kl is negative or not finite, or if the devices differ
template <typename FreeBits = PerPosition, typename Logits>
VAELossOutput compute_vae_loss(const Logits& logits, const torch::Tensor& targets, const torch::Tensor& z_logits,
                               const VAELossOptions& options) {
  constexpr const char* function = "compute_vae_loss";
  detail::check_not_negative(function, "beta_kl", options.beta_kl());
  constexpr auto is_unreduced = [](const Reduction& reduction) {
    return std::holds_alternative<torch::enumtype::kNone>(reduction);
  };
  TORCH_CHECK(is_unreduced(options.reconstruction().reduction()) == is_unreduced(options.kl().reduction()), function,
              ": reduction must be kNone for both terms or for neither, got kNone for one alone");
  const ReconstructionResult reconstruction = reconstruct(logits, targets, options.reconstruction());
  detail::check_defined(function, "z_logits", z_logits);
  detail::check_device(function, "z_logits", z_logits, "the logits", reconstruction.loss.device());
  const auto latent = detail::latent_kl<FreeBits>(
      z_logits, options.mask_ignored_latents() ? detail::masked_like_targets(function, options, targets, z_logits)
                                               : options.kl());
  TORCH_CHECK(reconstruction.loss.sizes() == latent.loss.sizes(), function,
              ": z_logits must have the positions of the targets with kNone, ", reconstruction.loss.sizes(), ", got ",
              latent.loss.sizes());
  return {at::add(reconstruction.loss, latent.loss, /*alpha=*/options.beta_kl()),
          LossMetrics(reconstruction.sums, latent.sums, options.beta_kl(), options.free_bits(),
                      std::is_same_v<FreeBits, BatchMean>, options.accuracy())};
}

template <typename FreeBits = PerPosition, typename Logits>
VAELossOutput compute_vae_loss(const Logits& logits, const torch::Tensor& targets, const torch::Tensor& z_logits,
                               int64_t latent_dim = 16, double beta_kl = 1.0, double free_bits = 0.3466,
                               int64_t ignore_index = -100) {
  return compute_vae_loss<FreeBits>(
      logits, targets, z_logits,
      VAELossOptions().latent_dim(latent_dim).beta_kl(beta_kl).free_bits(free_bits).ignore_index(ignore_index));
}

}  // namespace free_transformer
