/// The free-bits KL of all positions in LibTorch operations, for any policy.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <cstdint>
#include <vector>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/plain/bernoulli_kl.hpp"
#include "free_transformer/detail/plain/row_blocks.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::plain {

struct LatentPositions {
  at::Tensor token_weight;  ///< [N] in the widest type; without weights one number, expanded
  at::Tensor left_out;      ///< [N] bool: weight 0
};

inline LatentPositions latent_positions(const at::Tensor& z_logits, const LatentSettings& settings) {
  const auto options = z_logits.options().dtype(widest_type(z_logits.device()));
  const int64_t rows = z_logits.numel() / z_logits.size(-1);
  const at::Tensor weight = settings.token_weight.defined() ? settings.token_weight : at::ones({1}, options);
  return {weight.expand({rows}), (weight == 0).expand({rows})};
}

/// Rows of the prior that belong to a block of z_logits; undefined is the uniform prior.
inline at::Tensor prior_of_block(const at::Tensor& prior_logits, int64_t first, int64_t rows) {
  if (!prior_logits.defined()) return {};
  const at::Tensor wide = prior_logits.detach().to(widest_type(prior_logits.device()));
  if (prior_logits.dim() == 1) return wide.expand({rows, prior_logits.size(0)});
  return wide.reshape({-1, prior_logits.size(-1)}).narrow(0, first, rows);
}

/// KL of each bit of a block, [rows, latent_dim] in the widest type, 0 where the position is left out.
inline at::Tensor bit_kl_of_block(const at::Tensor& block, const at::Tensor& prior, const at::Tensor& left_out) {
  return bernoulli_kl(block.to(widest_type(block.device())), prior).masked_fill_(left_out.unsqueeze(1), 0);
}

struct LatentLosses {
  at::Tensor penalty;  ///< [N] in the widest type, weighted; undefined if not asked for
  at::Tensor sums;     ///< see `LatentSum`
  at::Tensor mean_kl;  ///< 0-dim, what the policies see of the batch
};

template <typename FreeBits>
LatentLosses latent_losses(const at::Tensor& z_logits, const LatentSettings& settings, const LatentPositions& positions,
                           bool keep_penalty) {
  const int64_t bits = z_logits.size(-1);
  const auto for_each_block_kl = [&](const auto& visit) {
    for_each_row_block(z_logits, 0, [&](const at::Tensor& block, int64_t first) {
      const auto part = [&](const at::Tensor& all) { return all.narrow(0, first, block.size(0)); };
      const at::Tensor prior = prior_of_block(settings.prior_logits, first, block.size(0));
      visit(bit_kl_of_block(block, prior, part(positions.left_out)), part);
    });
  };
  const at::Tensor& u = positions.token_weight;
  std::vector<at::Tensor> kl_sums{at::zeros({bits + 1}, u.options())};  // a block's sum of u KL for each bit, and of u
  for_each_block_kl([&](const at::Tensor& kl, const auto& part) {
    const at::Tensor weight = part(u).unsqueeze(1);
    kl_sums.push_back(ordered_sum(at::cat({kl * weight, weight}, 1).t()));
  });
  const at::Tensor kl_sum = ordered_sum(at::stack(kl_sums, 1));
  const at::Tensor bit_sums = kl_sum.narrow(0, 0, bits), weight_sum = kl_sum.narrow(0, bits, 1);
  LatentLosses losses{
      keep_penalty ? at::zeros(u.sizes(), u.options()) : at::Tensor(), {}, bit_sums.sum() / weight_sum.squeeze(0)};
  const at::Tensor above_any_budget = at::zeros_like(losses.mean_kl).reciprocal();
  std::vector<at::Tensor> penalty_sums{
      at::zeros({2}, u.options())};  // a block's sums of the penalty and of active positions
  for_each_block_kl([&](const at::Tensor& kl, const auto& part) {
    const at::Tensor penalty =
        (FreeBits::penalty(kl, losses.mean_kl, settings.free_bits) * part(u)).masked_fill_(part(positions.left_out), 0);
    const at::Tensor active = (FreeBits::penalty(kl, above_any_budget, settings.free_bits) > 0) * part(u);
    penalty_sums.push_back(ordered_sum(at::stack({penalty, active})));
    if (keep_penalty) part(losses.penalty).copy_(penalty);
  });
  const at::Tensor sums = ordered_sum(at::stack(penalty_sums, 1));
  losses.sums = at::cat({sums.narrow(0, 0, 1), weight_sum, sums.narrow(0, 1, 1), bit_sums});
  return losses;
}

struct LatentGradients {
  at::Tensor z_logits, prior_logits;  ///< undefined where not wanted
};

/// Gradients of sum_t scale_t penalty_t; scale is [N] or 0-dim in the widest type, the token weight is applied here.
template <typename FreeBits>
LatentGradients latent_gradients(const at::Tensor& z_logits, const LatentSettings& settings,
                                 const LatentPositions& positions, const at::Tensor& mean_kl, const at::Tensor& scale) {
  const int64_t bits = z_logits.size(-1);
  const at::Tensor& prior_logits = settings.prior_logits;
  const auto options = positions.token_weight.options();
  LatentGradients gradients;
  if (z_logits.requires_grad()) gradients.z_logits = at::empty(z_logits.sizes(), z_logits.options());
  std::vector<at::Tensor> prior_gradients;
  for_each_row_block(z_logits.detach(), 0, [&](const at::Tensor& block, int64_t first) {
    const auto part = [&](const at::Tensor& all) { return all.narrow(0, first, block.size(0)); };
    const at::Tensor prior = prior_of_block(settings.prior_logits, first, block.size(0));
    const at::Tensor left_out = part(positions.left_out);
    const at::Tensor position_scale =
        (part(positions.token_weight) * (scale.dim() == 0 ? scale : part(scale))).masked_fill_(left_out, 0);
    const at::Tensor kl = bit_kl_of_block(block, prior, left_out);
    at::Tensor gate;  // d loss / d KL of each bit
    {
      const at::AutoGradMode enable(true);
      const at::Tensor leaf = kl.requires_grad_();
      gate = torch::autograd::grad({FreeBits::penalty(leaf, mean_kl, settings.free_bits)}, {leaf}, {position_scale})[0];
    }
    const at::Tensor wide = block.to(kl.scalar_type());
    const auto finish = [&](const at::Tensor& of_kl) { return (gate * of_kl).masked_fill_(left_out.unsqueeze(1), 0); };
    if (gradients.z_logits.defined()) {
      part(gradients.z_logits.view({-1, bits})).copy_(finish(bernoulli_kl_gradient(wide, prior)));
    }
    if (prior_logits.defined() && prior_logits.requires_grad()) {
      const at::Tensor gradient = finish(bernoulli_kl_prior_gradient(wide, prior));
      prior_gradients.push_back(prior_logits.dim() == 1 ? ordered_sum(gradient.t()) : gradient);
    }
  });
  if (prior_logits.defined() && prior_logits.requires_grad()) {
    const at::Tensor none = at::zeros({0, bits}, options);
    at::Tensor gradient = prior_logits.dim() == 1 ? at::zeros({bits}, options) : none;
    if (!prior_gradients.empty()) {
      gradient = prior_logits.dim() == 1 ? ordered_sum(at::stack(prior_gradients, 1)) : at::cat(prior_gradients);
    }
    gradients.prior_logits = gradient.reshape(prior_logits.sizes()).to(prior_logits.scalar_type());
  }
  return gradients;
}

/// sum_t scale_t penalty_t as a differentiable expression, for a backward through the backward.
template <typename FreeBits>
at::Tensor differentiable_latent_loss(const at::Tensor& z_logits, const LatentSettings& settings,
                                      const LatentPositions& positions, const at::Tensor& mean_kl,
                                      const at::Tensor& scale) {
  const auto wide = widest_type(z_logits.device());
  const int64_t bits = z_logits.size(-1);
  const at::Tensor left_out = positions.left_out.unsqueeze(1);
  const at::Tensor z = z_logits.to(wide).reshape({-1, bits}).masked_fill(left_out, 0);
  at::Tensor prior;
  if (settings.prior_logits.defined()) {
    prior = settings.prior_logits.to(wide).reshape({-1, bits}).expand({z.size(0), bits}).masked_fill(left_out, 0);
  }
  const at::Tensor penalty =
      FreeBits::penalty(BernoulliKLFunction::apply(z, optional_tensor(prior)), mean_kl, settings.free_bits);
  return (penalty * positions.token_weight * scale).masked_fill(positions.left_out, 0).sum();
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::plain
