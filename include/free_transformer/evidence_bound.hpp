/// Bounds on the evidence, the likelihood of sequences with the latent bits summed out: the figures by which this model may
/// be compared with one without latents, and with itself.
///
///     bits = sample_latent_bits(z_logits);
///     log_likelihood = compute_token_statistics(decode(tokens, bits), targets).target_log_probability;
///     bound += compute_evidence_lower_bound(log_likelihood, z_logits);  // batch after batch
///     bound.bits_per_byte(bytes);
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/arg.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/checks/evidence_bound.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/plain/bernoulli_kl.hpp"
#include "free_transformer/detail/plain/latent_kl.hpp"
#include "free_transformer/detail/plain/row_blocks.hpp"

namespace free_transformer {

inline namespace FREE_TRANSFORMER_TYPES {

/// Options of both bounds. Sequences with padding at their end get the same mask for both.
struct EvidenceBoundOptions {
  /// Which tokens count, bool [..., tokens]. Default: all, also those whose log_likelihood is 0 as they were ignored.
  TORCH_ARG(at::Tensor, token_mask);

  /// Which latents there are, bool [..., positions]. Default: all. What is left out must have no way to a token that counts:
  /// the result would be no bound.
  TORCH_ARG(at::Tensor, latent_mask);

  /// Logits of the prior that Z is drawn from at generation, `[latent_dim]` or like z_logits. Default: 0, all codes alike.
  TORCH_ARG(at::Tensor, prior_logits);
};

/// An upper bound on -log p(x) of each sequence x, on their device. a += b gives that of the sequences of both. The figures
/// are means over all sequences, 0 where there is none; reading one copies a number to the host.
struct EvidenceBound {
  at::Tensor nats;    ///< of each sequence, float64 (MPS: float32) [...]
  at::Tensor tokens;  ///< that count in each, int64 [...]

  double nats_per_token() const { return per(tokens.defined() ? tokens.sum().item<double>() : 0); }
  double bits_per_token() const { return nats_per_token() / std::log(2.0); }

  /// bytes >= 1, the length of the text of all sequences, whatever the tokens are; else c10::Error.
  double bits_per_byte(int64_t bytes) const {
    TORCH_CHECK(bytes >= 1, "EvidenceBound::bits_per_byte: bytes must be >= 1, got ", bytes);
    return per(static_cast<double>(bytes)) / std::log(2.0);
  }

  EvidenceBound& operator+=(const EvidenceBound& other) {
    if (!other.nats.defined()) return *this;
    if (!nats.defined()) return *this = other;
    nats = at::cat({nats.reshape({-1}), other.nats.reshape({-1}).to(nats.device())});
    tokens = at::cat({tokens.reshape({-1}), other.tokens.reshape({-1}).to(tokens.device())});
    return *this;
  }
  friend EvidenceBound operator+(EvidenceBound left, const EvidenceBound& right) { return left += right; }

 private:
  double per(double count) const {
    return detail::is_zero(count) || !nats.defined()
               ? 0
               : detail::ordered_sum(nats.flatten(), nats.scalar_type()).item<double>() / count;
  }
};

}  // namespace FREE_TRANSFORMER_TYPES

inline namespace FREE_TRANSFORMER_FUNCTIONS {

/// The evidence lower bound with the sign of a loss, as `bound/elbo` of the metrics, of each sequence in nats:
///     E_q[-log p(x|z)] + KL(q(z|x) || p(z)) >= -log p(x)
/// the KL of all latents before any hinge. With log_likelihood of one draw of z from q it is that bound in expectation; a
/// single call may lie below.
/// log_likelihood  [..., tokens], log p(x_t | x_<t, z) in nats: `target_log_probability` of `TokenStatistics`
/// z_logits        [..., positions, latent_dim], the encoder's, floating
/// Returns         nats and counted tokens of each sequence, without a graph. A NaN is looked at only where it counts
/// Throws          c10::Error if shapes, types or devices do not fit
inline EvidenceBound compute_evidence_lower_bound(const at::Tensor& log_likelihood, const at::Tensor& z_logits,
                                                  const EvidenceBoundOptions& options = {});

/// The importance-weighted bound (Burda et al. 2016) from K samples of the encoder, of each sequence in nats:
///     -log 1/K sum_k exp(log p(x|z_k) + log p(z_k) - log q(z_k|x)),   z_k ~ q(z|x)
/// Its expectation is at least -log p(x), no larger for more samples, and comes to -log p(x); that for K = 1 is the evidence
/// lower bound's. A single call may lie below -log p(x), but by c nats or more in a share exp(-c) of calls at most.
/// log_likelihood  [K, ..., tokens], K >= 1: as above, for each sample
/// z_logits        [..., positions, latent_dim]
/// bits            [K, ..., positions, latent_dim]: `sample_latent_bits(z_logits)` K times, as `pack_latent_bits` takes them
/// Returns, Throws as above; -inf for a sample that z_logits rule out, which cannot be theirs
inline EvidenceBound compute_importance_weighted_bound(const at::Tensor& log_likelihood, const at::Tensor& z_logits,
                                                       const at::Tensor& bits,
                                                       const EvidenceBoundOptions& options = {});

}  // namespace FREE_TRANSFORMER_FUNCTIONS

namespace FREE_TRANSFORMER_DETAIL {

/// Sum over the last dimension in float64 of what counts.
inline at::Tensor masked_sum(const at::Tensor& values, const at::Tensor& mask) {
  const at::Tensor counted = mask.defined() ? values.masked_fill(mask == 0, 0) : values;
  return ordered_sum(counted, widest_type(values.device()));
}

inline at::Tensor counted_tokens(const at::Tensor& tokens_of_sample, const at::Tensor& mask) {
  if (mask.defined()) return mask.sum(-1);
  const at::IntArrayRef shape = tokens_of_sample.sizes();
  return at::full(shape.slice(0, shape.size() - 1), shape.back(), tokens_of_sample.options().dtype(at::kLong));
}

/// KL of each position, [..., positions].
inline at::Tensor kl_of_positions(const at::Tensor& z_logits, const at::Tensor& prior_logits) {
  const auto wide = widest_type(z_logits.device());
  at::Tensor result = at::empty(shape_of_positions(z_logits), z_logits.options().dtype(wide));
  const at::Tensor flat = result.view({-1});
  const at::Tensor rows_of_prior = plain::rows_of_prior(prior_logits);
  for_each_row_block(z_logits, 0, [&](const at::Tensor& block, int64_t first) {
    const at::Tensor prior = plain::prior_of_block(rows_of_prior, first, block.size(0));
    flat.narrow(0, first, block.size(0)).copy_(plain::bernoulli_kl(block.to(wide), prior).sum(-1));
  });
  return result;
}

/// log P(bits) of each position in float64; undefined logits are uniform.
inline at::Tensor log_probability_of_positions(const at::Tensor& logits, const at::Tensor& is_one) {
  const auto wide = widest_type(is_one.device());
  if (!logits.defined()) {
    return at::full({}, -static_cast<double>(is_one.size(-1)) * std::log(2.0), is_one.options().dtype(wide));
  }
  return plain::log_probability_of_bits(logits.to(wide), is_one);
}

}  // namespace FREE_TRANSFORMER_DETAIL

inline namespace FREE_TRANSFORMER_FUNCTIONS {

inline EvidenceBound compute_evidence_lower_bound(const at::Tensor& log_likelihood, const at::Tensor& z_logits,
                                                  const EvidenceBoundOptions& options) {
  constexpr const char* function = "compute_evidence_lower_bound";
  detail::check_floating(function, "log_likelihood", log_likelihood);
  detail::check_evidence(function, log_likelihood, z_logits, options);
  const at::NoGradGuard no_grad;
  const at::Tensor kl = detail::kl_of_positions(z_logits, options.prior_logits());
  return {detail::masked_sum(kl, options.latent_mask()) - detail::masked_sum(log_likelihood, options.token_mask()),
          detail::counted_tokens(log_likelihood, options.token_mask())};
}

inline EvidenceBound compute_importance_weighted_bound(const at::Tensor& log_likelihood, const at::Tensor& z_logits,
                                                       const at::Tensor& bits, const EvidenceBoundOptions& options) {
  constexpr const char* function = "compute_importance_weighted_bound";
  constexpr double infinity = std::numeric_limits<double>::infinity();
  detail::check_floating(function, "log_likelihood", log_likelihood);
  TORCH_CHECK(log_likelihood.dim() >= 1 && log_likelihood.size(0) >= 1, function,
              ": log_likelihood must have the shape [K, ..., tokens] with K >= 1 samples, got ",
              log_likelihood.sizes());
  detail::check_evidence(function, log_likelihood.select(0, 0), z_logits, options);
  const int64_t samples = log_likelihood.size(0);
  const at::Tensor is_one = detail::checked_bits_of_samples(function, bits, z_logits, samples);
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> log_weights;
  for (int64_t sample = 0; sample < samples; ++sample) {
    const at::Tensor of_sample = is_one[sample];
    const at::Tensor log_q = detail::log_probability_of_positions(z_logits, of_sample);
    const at::Tensor log_p = detail::log_probability_of_positions(options.prior_logits(), of_sample).expand_as(log_q);
    const at::Tensor joint = detail::masked_sum(log_likelihood[sample], options.token_mask()) +
                             detail::masked_sum(log_p, options.latent_mask());
    const at::Tensor of_q = detail::masked_sum(log_q, options.latent_mask());
    // Infinitely more likely than under z_logits is what they rule out, also where the prior or the decoder does so, too.
    log_weights.push_back((joint - of_q).masked_fill((of_q == -infinity) & joint.eq(joint), infinity));
  }
  const at::Tensor weights = at::stack(log_weights);
  // LibTorch 1.13 has no logsumexp of meta tensors.
  const at::Tensor sum = weights.is_meta() ? weights.sum(0) : weights.logsumexp(0);
  return {std::log(static_cast<double>(samples)) - sum,
          detail::counted_tokens(log_likelihood[0], options.token_mask())};
}

}  // namespace FREE_TRANSFORMER_FUNCTIONS

}  // namespace free_transformer
