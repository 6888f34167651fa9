/// The free-bits KL of all positions in LibTorch operations, for any policy.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <cstdint>
#include <vector>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/autograd/optional_tensor.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/plain/bernoulli_kl.hpp"
#include "free_transformer/detail/plain/row_blocks.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::plain {

/// The weight of each position, [N] in the widest type, and where it is 0; undefined without weights.
struct LatentPositions {
  explicit LatentPositions(const LatentSettings& settings) : token_weight(settings.token_weight) {
    if (token_weight.defined()) left_out = token_weight == 0;
  }

  LatentPositions narrowed(int64_t first, int64_t count) const {
    LatentPositions part = *this;
    if (token_weight.defined()) {
      part.token_weight = token_weight.narrow(0, first, count);
      part.left_out = left_out.narrow(0, first, count);
    }
    return part;
  }

  /// Values, or rows of them, with 0 where a position is left out.
  at::Tensor counted(const at::Tensor& values) const {
    if (!left_out.defined()) return values;
    return values.masked_fill(values.dim() == 2 ? left_out.unsqueeze(1) : left_out, 0);
  }

  at::Tensor weighted(const at::Tensor& values) const {
    if (!token_weight.defined()) return values;
    return counted(values * (values.dim() == 2 ? token_weight.unsqueeze(1) : token_weight));
  }

  at::Tensor token_weight, left_out;
};

/// Rows of the prior that belong to a block of z_logits; undefined is the uniform prior.
inline at::Tensor prior_of_block(const at::Tensor& prior_logits, int64_t first, int64_t rows) {
  if (!prior_logits.defined()) return {};
  const at::Tensor wide = prior_logits.detach().to(widest_type(prior_logits.device()));
  if (prior_logits.dim() == 1) return wide.expand({rows, prior_logits.size(0)});
  return wide.reshape({-1, prior_logits.size(-1)}).narrow(0, first, rows);
}

/// Mean over the batch of a position's KL, from its sums.
inline at::Tensor mean_kl(const at::Tensor& sums) {
  return sums.slice(0, latent_sum_count).sum() / sums[latent_weight_sum];
}

/// All positions. `scale` is that of an earlier call, or undefined: then it follows from the normalization. upstream is [N]
/// in the widest type and multiplies the scale, or undefined.
template <typename FreeBits>
LatentRows latent_rows(const at::Tensor& z_logits, const LatentSettings& settings, const Normalization& normalization,
                       const at::Tensor& scale, const at::Tensor& upstream, const WantedOfLatents& wanted) {
  const int64_t bits = z_logits.size(-1), rows = z_logits.numel() / bits;
  const auto wide = widest_type(z_logits.device());
  const auto options = z_logits.options().dtype(wide);
  const LatentPositions all_positions(settings);
  at::Tensor only_kl;  // kept for the second walk where there is one block
  const auto for_each_block = [&](const auto& visit) {
    for_each_row_block(z_logits.detach(), 0, [&](const at::Tensor& block, int64_t first) {
      const auto positions = all_positions.narrowed(first, block.size(0));
      const at::Tensor z = block.to(wide), prior = prior_of_block(settings.prior_logits, first, block.size(0));
      const at::Tensor kl = only_kl.defined() ? only_kl : positions.counted(bernoulli_kl(z, prior));
      visit(kl, positions, z, prior, first);
      if (block.numel() == z_logits.numel()) only_kl = kl.detach();
    });
  };

  std::vector<at::Tensor> kl_sums{at::zeros({bits}, options)};  // of each block and bit
  for_each_block([&](const at::Tensor& kl, const auto& positions, auto&&...) {
    kl_sums.push_back(ordered_sum(positions.weighted(kl).t(), wide));
  });
  const at::Tensor bit_sums = ordered_sum(at::stack(kl_sums, 1), wide);
  const at::Tensor weight =
      settings.token_weight.defined() ? ordered_sum(settings.token_weight, wide) : at::full({}, rows, options);
  const at::Tensor mean = bit_sums.sum() / weight, above_any_budget = at::zeros_like(mean).reciprocal();

  LatentRows result;
  result.scale = scale.defined() ? scale : loss_scale(normalization, weight, weight);
  if (wanted.penalty)
    result.penalty = at::zeros({rows}, z_logits.options().dtype(arithmetic_type(z_logits.scalar_type())));
  if (wanted.gradient) result.gradient = at::empty(z_logits.sizes(), z_logits.options());
  std::vector<at::Tensor> penalty_sums{
      at::zeros({2}, options)};  // of each block: of the penalty and of active positions
  std::vector<at::Tensor> prior_gradients;
  for_each_block(
      [&](const at::Tensor& kl, const auto& positions, const at::Tensor& z, const at::Tensor& prior, int64_t first) {
        const auto part = [&](const at::Tensor& all) { return all.narrow(0, first, kl.size(0)); };
        const bool wants_gradient = wanted.gradient || wanted.prior_gradient;
        at::Tensor penalty, gate;  // d loss / d KL of each bit
        {
          const at::AutoGradMode with_graph(wants_gradient);
          const at::Tensor leaf = wants_gradient ? kl.detach().requires_grad_() : kl;
          penalty = FreeBits::penalty(leaf, mean, settings.free_bits);
          if (wants_gradient) {
            const at::Tensor factor =
                upstream.defined() ? part(upstream) * result.scale : result.scale.expand({kl.size(0)});
            gate = torch::autograd::grad({penalty}, {leaf}, {positions.weighted(factor)})[0];
          }
        }
        const at::Tensor weighted = positions.weighted(penalty.detach());
        const at::Tensor is_active = FreeBits::penalty(kl, above_any_budget, settings.free_bits) > 0;
        penalty_sums.push_back(ordered_sum(at::stack({weighted, positions.weighted(is_active.to(wide))}), wide));
        if (wanted.penalty) part(result.penalty).copy_(weighted);
        if (wanted.gradient) {
          part(result.gradient.view({-1, bits})).copy_(positions.counted(gate * bernoulli_kl_gradient(z, prior)));
        }
        if (wanted.prior_gradient) {
          const at::Tensor gradient = positions.counted(gate * bernoulli_kl_prior_gradient(z, prior));
          prior_gradients.push_back(settings.prior_logits.dim() == 1 ? ordered_sum(gradient.t(), wide) : gradient);
        }
      });
  const at::Tensor sums = ordered_sum(at::stack(penalty_sums, 1), wide);
  result.sums = at::cat({sums.narrow(0, 0, 1), weight.reshape({1}), sums.narrow(0, 1, 1), bit_sums});
  if (wanted.prior_gradient) {
    const at::Tensor& prior = settings.prior_logits;
    const bool is_one_for_all = prior.dim() == 1;
    prior_gradients.push_back(at::zeros(is_one_for_all ? at::IntArrayRef{bits} : at::IntArrayRef{0, bits}, options));
    const at::Tensor gradient =
        is_one_for_all ? ordered_sum(at::stack(prior_gradients, 1), wide) : at::cat(prior_gradients);
    result.prior_gradient = gradient.reshape(prior.sizes()).to(prior.scalar_type());
  }
  return result;
}

/// sum_t scale_t penalty_t as a differentiable expression, for a backward through the backward.
template <typename FreeBits>
at::Tensor differentiable_latent_loss(const at::Tensor& z_logits, const LatentSettings& settings,
                                      const at::Tensor& mean_kl, const at::Tensor& scale) {
  const auto wide = widest_type(z_logits.device());
  const int64_t bits = z_logits.size(-1);
  const LatentPositions positions(settings);
  const at::Tensor z = positions.counted(z_logits.to(wide).reshape({-1, bits}));
  at::Tensor prior;
  if (settings.prior_logits.defined()) {
    prior = positions.counted(settings.prior_logits.to(wide).reshape({-1, bits}).expand({z.size(0), bits}));
  }
  const at::Tensor penalty = FreeBits::penalty(differentiable_bernoulli_kl(z, prior), mean_kl, settings.free_bits);
  return positions.weighted(penalty * scale).sum();
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::plain
