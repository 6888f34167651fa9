/// The whole training loss of the Free Transformer, and the figures to log beside it.
#pragma once

#include <ATen/ATen.h>
#include <torch/arg.h>

#include <cstdint>
#include <exception>
#include <limits>
#include <type_traits>

#include "free_transformer/detail/checks/normalization.hpp"
#include "free_transformer/detail/checks/vae_loss.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/kl_divergence.hpp"
#include "free_transformer/loss_metrics.hpp"
#include "free_transformer/reconstruction_loss.hpp"

namespace free_transformer {

inline namespace FREE_TRANSFORMER_TYPES {

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

  /// True: the metrics also show the KL of each latent bit, "latent/kl_bits/0" and so on. Costs nothing. Default: false.
  TORCH_ARG(bool, kl_of_each_bit) = false;
};

struct VAELossOutput {
  at::Tensor loss;
  LossMetrics metrics;
};

}  // namespace FREE_TRANSFORMER_TYPES

namespace FREE_TRANSFORMER_DETAIL {

/// In float64 where float32 cannot hold beta: LibTorch's add throws something then that is not a c10::Error.
inline at::Tensor balanced_sum(const at::Tensor& reconstruction, const at::Tensor& latent, double beta) {
  if (beta <= std::numeric_limits<float>::max()) return at::add(reconstruction, latent, /*alpha=*/beta);
  return at::add(reconstruction, latent.to(at::kDouble), beta)
      .to(c10::promoteTypes(reconstruction.scalar_type(), latent.scalar_type()));
}

}  // namespace FREE_TRANSFORMER_DETAIL

inline namespace FREE_TRANSFORMER_FUNCTIONS {

/// The training loss, L = reconstruction + beta_kl latent, in nats. Fleuret 2025, Eq. 5.
/// logits, targets  as in `compute_reconstruction_loss`
/// z_logits         as in `compute_kl_divergence`: the encoder's logits of the latent bits, [..., latent_dim]
/// Returns          {loss, metrics}: the loss with its graph, the metrics without one, both on the device
/// Saved            what both terms save
/// Throws           c10::Error as both terms do, if beta_kl is negative or not finite, or if the devices differ; logits
///                  given inplace are untouched then, whichever argument was refused
template <typename FreeBits = PerPosition, typename Logits>
VAELossOutput compute_vae_loss(const Logits& logits, const at::Tensor& targets, const at::Tensor& z_logits,
                               const VAELossOptions& options);

/// The same with the options that the paper has.
template <typename FreeBits = PerPosition, typename Logits>
VAELossOutput compute_vae_loss(const Logits& logits, const at::Tensor& targets, const at::Tensor& z_logits,
                               int64_t latent_dim = 16, double beta_kl = 1.0, double free_bits = 0.3466,
                               int64_t ignore_index = -100);

template <typename FreeBits, typename Logits>
VAELossOutput compute_vae_loss(const Logits& logits, const at::Tensor& targets, const at::Tensor& z_logits,
                               const VAELossOptions& options) {
  const auto latent = [&] {  // first, as the other term may write over what this one reads
    try {
      detail::check_balance("compute_vae_loss", options);
      const auto settings = detail::checked_latent_term(logits, targets, z_logits, options);
      const auto normalization =
          detail::checked_normalization("compute_kl_divergence", options.kl().reduction(), options.kl().normalizer());
      return detail::latent_kl<FreeBits>(detail::beside_logits(z_logits, logits, options),
                                         detail::masked_like_targets(settings, targets, options), normalization,
                                         /*wants_metrics=*/true);
    } catch (...) {
      abandon_reconstruction(logits, std::current_exception());
      throw;
    }
  }();
  const ReconstructionResult reconstruction = reconstruct(logits, targets, options.reconstruction());
  return {detail::balanced_sum(reconstruction.loss, latent.loss, options.beta_kl()),
          LossMetrics(reconstruction.sums, latent.sums, options.beta_kl(), options.free_bits(),
                      std::is_same_v<FreeBits, BatchMean>, options.accuracy(), options.reconstruction().z_loss() > 0,
                      options.kl_of_each_bit())};
}

template <typename FreeBits, typename Logits>
VAELossOutput compute_vae_loss(const Logits& logits, const at::Tensor& targets, const at::Tensor& z_logits,
                               int64_t latent_dim, double beta_kl, double free_bits, int64_t ignore_index) {
  return compute_vae_loss<FreeBits>(
      logits, targets, z_logits,
      VAELossOptions().latent_dim(latent_dim).beta_kl(beta_kl).free_bits(free_bits).ignore_index(ignore_index));
}

}  // namespace FREE_TRANSFORMER_FUNCTIONS

}  // namespace free_transformer
