/// The latent term: KL of the latent bits from their prior, above a budget of free bits.
#pragma once

#include <ATen/ATen.h>
#include <torch/arg.h>

#include <cmath>
#include <cstdint>
#include <optional>

#include "free_transformer/detail/autograd/latent_kl.hpp"
#include "free_transformer/detail/checks/latent.hpp"
#include "free_transformer/detail/checks/normalization.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/reduction.hpp"

namespace free_transformer {

/// Nats of n bits, n log 2. Half a bit is the default budget of free bits, 0.3466 nats.
inline double bits(double n) { return n * std::log(2.0); }

inline namespace FREE_TRANSFORMER_TYPES {

/// Where the hinge of the free bits sits. A policy of your own is a struct with one static function,
///     Tensor penalty(bit_kl [n, latent_dim], mean_kl [], double free_bits) -> [n],
/// in differentiable operations: what n positions add to the sum, from the KL of each of their bits in nats. mean_kl is
/// the mean over the batch of a position's KL, a constant for the gradient. It is called for blocks of positions.
///
/// This one is the paper's, Eq. 5: each position has a budget, max(0, sum_h KL_th - free_bits). Its hinge lets the
/// gradient through at the budget itself, so that no budget is no hinge (LibTorch's clamp_min does in some versions), and
/// a NaN, which is not below any budget.
struct PerPosition {
  static at::Tensor penalty(const at::Tensor& bit_kl, const at::Tensor& /*mean_kl*/, double free_bits) {
    const at::Tensor difference = bit_kl.sum(-1) - free_bits;
    return difference.masked_fill(difference < 0, 0);
  }
};

/// Kingma et al. 2016: each latent bit has a budget, sum_h max(0, KL_th - free_bits).
struct PerBit {
  static at::Tensor penalty(const at::Tensor& bit_kl, const at::Tensor& /*mean_kl*/, double free_bits) {
    const at::Tensor difference = bit_kl - free_bits;
    return difference.masked_fill(difference < 0, 0).sum(-1);
  }
};

/// The batch has a budget, max(0, mean_t sum_h KL_th - free_bits): KL_t - free_bits at each position while the mean is
/// above.
struct BatchMean {
  static at::Tensor penalty(const at::Tensor& bit_kl, const at::Tensor& mean_kl, double free_bits) {
    const at::Tensor difference = bit_kl.sum(-1) - free_bits;
    return difference.masked_fill(mean_kl < free_bits, 0);
  }
};

/// Options of `compute_kl_divergence`.
struct KLDivergenceOptions {
  /// H >= 1, the number of latent bits. Default: 16.
  TORCH_ARG(int64_t, latent_dim) = 16;

  /// kappa >= 0, the budget in nats: for each position, bit or batch, as the policy has it. Default: half a bit, 0.3466.
  TORCH_ARG(double, free_bits) = 0.3466;

  /// Weight u of each position, `[...]`, bool or floating, finite and >= 0. Default: 1 everywhere.
  TORCH_ARG(at::Tensor, token_weight);

  /// Logits of the prior's bits, `[latent_dim]` or like z_logits; they get a gradient. Default: 0, all codes alike.
  TORCH_ARG(at::Tensor, prior_logits);

  /// `torch::kMean` (default), `torch::kSum` or `torch::kNone`.
  TORCH_ARG(Reduction, reduction) = torch::enumtype::kMean{};

  /// Divides the sum under `torch::kMean`, instead of the weights counted here; the other reductions ignore it.
  TORCH_ARG(Normalizer, normalizer);
};

}  // namespace FREE_TRANSFORMER_TYPES

inline namespace FREE_TRANSFORMER_FUNCTIONS {

/// Free-bits KL of the latent bits, in nats. Fleuret 2025, Eq. 5; with u = 1 and a uniform prior
///     L = 1/T sum_t max(0, sum_h KL(Bernoulli(sigmoid(z_th)) || Bernoulli(1/2)) - kappa)
/// and in general sum_t u_t penalty_t / normalizer, the normalizer being sum_t u_t if none is given.
/// z_logits   [..., latent_dim], floating; half and bfloat16 are computed in float32 or better. +-inf is a sure bit
/// Returns    a scalar, or [...] with kNone; float32, or float64 for float64. 0 if nothing counts, NaN if a NaN counts.
///            Each bit's KL is within 2 ulp of float32, also where z is tiny
/// Saved      z_logits, prior_logits, the weights; by the vector kernels also the gradient, for the first backward.
///            Double backward works
/// Throws     c10::Error if the last size is not latent_dim, free_bits is negative or not finite, a type is not
///            floating, or a weight or prior does not fit z_logits; for dual tensors, under functorch's transforms and
///            while tracing
template <typename FreeBits = PerPosition>
at::Tensor compute_kl_divergence(const at::Tensor& z_logits, const KLDivergenceOptions& options);

/// The same with the two options that the paper has.
template <typename FreeBits = PerPosition>
at::Tensor compute_kl_divergence(const at::Tensor& z_logits, int64_t latent_dim = 16, double free_bits = 0.3466);

}  // namespace FREE_TRANSFORMER_FUNCTIONS

namespace FREE_TRANSFORMER_DETAIL {

template <>
inline constexpr std::optional<kernels::Hinge> kernels::hinge_of<PerPosition> = kernels::Hinge::per_position;
template <>
inline constexpr std::optional<kernels::Hinge> kernels::hinge_of<PerBit> = kernels::Hinge::per_bit;
template <>
inline constexpr std::optional<kernels::Hinge> kernels::hinge_of<BatchMean> = kernels::Hinge::batch_mean;

}  // namespace FREE_TRANSFORMER_DETAIL

inline namespace FREE_TRANSFORMER_FUNCTIONS {

template <typename FreeBits>
at::Tensor compute_kl_divergence(const at::Tensor& z_logits, const KLDivergenceOptions& options) {
  constexpr const char* function = "compute_kl_divergence";
  const auto settings = detail::checked_latent_settings(function, z_logits, options, options.token_weight());
  const auto normalization = detail::checked_normalization(function, options.reduction(), options.normalizer());
  return detail::latent_kl<FreeBits>(z_logits, settings, normalization, /*wants_metrics=*/false).loss;
}

template <typename FreeBits>
at::Tensor compute_kl_divergence(const at::Tensor& z_logits, int64_t latent_dim, double free_bits) {
  return compute_kl_divergence<FreeBits>(z_logits, KLDivergenceOptions().latent_dim(latent_dim).free_bits(free_bits));
}

}  // namespace FREE_TRANSFORMER_FUNCTIONS

}  // namespace free_transformer
