/// The free-bits KL of all positions in LibTorch operations, for any policy.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/plain/bernoulli_kl.hpp"
#include "free_transformer/detail/plain/row_blocks.hpp"
#include "free_transformer/detail/settings.hpp"

FREE_TRANSFORMER_SMALL_CODE_BEGIN
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

/// The prior's rows, of which there is one for all positions or one for each; undefined is the uniform prior. Once for all
/// blocks: what cannot be viewed as rows is copied.
inline at::Tensor rows_of_prior(const at::Tensor& prior_logits) {
  return prior_logits.defined() ? prior_logits.detach().reshape({-1, prior_logits.size(-1)}) : prior_logits;
}

/// Those that belong to a block of z_logits, in the widest type.
inline at::Tensor prior_of_block(const at::Tensor& rows_of_all, int64_t first, int64_t rows) {
  if (!rows_of_all.defined()) return {};
  const bool is_one_for_all = rows_of_all.size(0) == 1;
  const at::Tensor of_block = is_one_for_all ? rows_of_all : rows_of_all.narrow(0, first, rows);
  return of_block.to(widest_type(rows_of_all.device())).expand({rows, rows_of_all.size(1)});
}

/// Mean over the batch of a position's KL, from its sums; undefined if they are the penalty's alone.
inline at::Tensor mean_kl(const at::Tensor& sums) {
  if (sums.numel() <= latent_sum_count) return {};
  return sums.slice(0, latent_sum_count).sum() / sums[latent_weight_sum];
}

/// Two walks over blocks of positions: the sums of each bit's KL, as a policy may look at their mean, and then what the
/// policy makes of them.
template <typename FreeBits>
class LatentWalks {
 public:
  LatentWalks(const at::Tensor& z_logits, const LatentSettings& settings, const at::Tensor& upstream,
              const WantedOfLatents& wanted)
      : z_logits_(z_logits.detach()),
        settings_(settings),
        prior_(rows_of_prior(settings.prior_logits)),
        positions_(settings),
        upstream_(upstream),
        wanted_(wanted),
        bits_(z_logits.size(-1)),
        rows_(z_logits.numel() / bits_),
        wide_(widest_type(z_logits.device())) {}

  LatentRows run(const Normalization& normalization, const at::Tensor& scale) {
    sum_bits();
    result_.scale = scale.defined() ? scale : loss_scale(normalization, weight_, weight_);
    if (wanted_.penalty) result_.penalty = at::zeros({rows_}, options(arithmetic_type(z_logits_.scalar_type())));
    if (wanted_.gradient) result_.gradient = at::empty(z_logits_.sizes(), z_logits_.options());
    penalty_sums_ = {at::zeros({2}, options(wide_))};
    for_each_block([&](const Block& block) { add(block); });
    const at::Tensor sums = ordered_sum(at::stack(penalty_sums_, 1), wide_);
    result_.sums = at::cat({sums.narrow(0, 0, 1), weight_.reshape({1}), sums.narrow(0, 1, 1), bit_sums_});
    if (wanted_.prior_gradient) result_.prior_gradient = prior_gradient();
    return std::move(result_);
  }

 private:
  struct Block {
    at::Tensor kl, z, prior;  ///< [n, bits]
    LatentPositions positions;
    int64_t first;

    at::Tensor part(const at::Tensor& all) const { return all.narrow(0, first, kl.size(0)); }
  };

  at::TensorOptions options(at::ScalarType type) const { return z_logits_.options().dtype(type); }

  template <typename Visit>
  void for_each_block(const Visit& visit) {
    for_each_row_block(z_logits_, 0, [&](const at::Tensor& rows, int64_t first) {
      const auto positions = positions_.narrowed(first, rows.size(0));
      const at::Tensor z = rows.to(wide_), prior = prior_of_block(prior_, first, rows.size(0));
      const at::Tensor kl = only_kl_.defined() ? only_kl_ : positions.counted(bernoulli_kl(z, prior));
      if (rows.numel() == z_logits_.numel()) only_kl_ = kl;
      visit(Block{kl, z, prior, positions, first});
    });
  }

  void sum_bits() {
    std::vector<at::Tensor> sums{at::zeros({bits_}, options(wide_))};
    for_each_block(
        [&](const Block& block) { sums.push_back(ordered_sum(block.positions.weighted(block.kl).t(), wide_)); });
    bit_sums_ = ordered_sum(at::stack(sums, 1), wide_);
    weight_ = settings_.token_weight.defined() ? ordered_sum(settings_.token_weight, wide_)
                                               : at::full({}, rows_, options(wide_));
    mean_ = bit_sums_.sum() / weight_;
    above_any_budget_ = at::zeros_like(mean_).reciprocal();
  }

  /// The policy's penalties, and d loss / d KL of each bit if a gradient is wanted.
  std::pair<at::Tensor, at::Tensor> penalty_and_gate(const Block& block) const {
    if (!wanted_.gradient && !wanted_.prior_gradient) {
      return {FreeBits::penalty(block.kl, mean_, settings_.free_bits), at::Tensor()};
    }
    const at::AutoGradMode with_graph(true);
    const at::Tensor leaf = block.kl.detach().requires_grad_();
    const at::Tensor penalty = FreeBits::penalty(leaf, mean_, settings_.free_bits);
    const at::Tensor factor =
        upstream_.defined() ? block.part(upstream_) * result_.scale : result_.scale.expand({block.kl.size(0)});
    const at::Tensor gate = torch::autograd::grad({penalty}, {leaf}, {block.positions.weighted(factor)})[0];
    return {penalty.detach(), gate};
  }

  void add(const Block& block) {
    const auto [penalty, gate] = penalty_and_gate(block);
    const LatentPositions& positions = block.positions;
    const at::Tensor weighted = positions.weighted(penalty);
    const at::Tensor is_active = FreeBits::penalty(block.kl, above_any_budget_, settings_.free_bits) > 0;
    penalty_sums_.push_back(ordered_sum(at::stack({weighted, positions.weighted(is_active.to(wide_))}), wide_));
    if (wanted_.penalty) block.part(result_.penalty).copy_(weighted);
    if (wanted_.gradient) {
      const at::Tensor gradient = positions.counted(gate * bernoulli_kl_gradient(block.z, block.prior));
      block.part(result_.gradient.view({-1, bits_})).copy_(gradient);
    }
    if (wanted_.prior_gradient) {
      const at::Tensor gradient = positions.counted(gate * bernoulli_kl_prior_gradient(block.z, block.prior));
      prior_gradients_.push_back(settings_.prior_logits.dim() == 1 ? ordered_sum(gradient.t(), wide_) : gradient);
    }
  }

  /// A prior for all positions gets their sum, one for each its own.
  at::Tensor prior_gradient() {
    const at::Tensor& prior = settings_.prior_logits;
    const bool is_one_for_all = prior.dim() == 1;
    prior_gradients_.push_back(
        at::zeros(is_one_for_all ? at::IntArrayRef{bits_} : at::IntArrayRef{0, bits_}, options(wide_)));
    const at::Tensor gradient =
        is_one_for_all ? ordered_sum(at::stack(prior_gradients_, 1), wide_) : at::cat(prior_gradients_);
    return gradient.reshape(prior.sizes()).to(prior.scalar_type());
  }

  const at::Tensor z_logits_;
  const LatentSettings& settings_;
  const at::Tensor prior_;
  const LatentPositions positions_;
  const at::Tensor& upstream_;
  const WantedOfLatents wanted_;
  const int64_t bits_, rows_;
  const at::ScalarType wide_;
  at::Tensor only_kl_;  ///< kept for the second walk where there is one block
  at::Tensor bit_sums_, weight_, mean_, above_any_budget_;
  std::vector<at::Tensor> penalty_sums_;  ///< of each block: of the penalty and of active positions
  std::vector<at::Tensor> prior_gradients_;
  LatentRows result_;
};

/// All positions. `scale` is that of an earlier call, or undefined: then it follows from the normalization. upstream is [N]
/// in the widest type and multiplies the scale, or undefined.
template <typename FreeBits>
LatentRows latent_rows(const at::Tensor& z_logits, const LatentSettings& settings, const Normalization& normalization,
                       const at::Tensor& scale, const at::Tensor& upstream, const WantedOfLatents& wanted) {
  return LatentWalks<FreeBits>(z_logits, settings, upstream, wanted).run(normalization, scale);
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
FREE_TRANSFORMER_SMALL_CODE_END
