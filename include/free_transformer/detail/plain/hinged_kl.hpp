/// The free-bits KL from the uniform prior with one of the library's hinges on a device, where each operation is a launch:
/// as few of them as keep the promises.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/hinge.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/plain/latent_kl.hpp"
#include "free_transformer/detail/plain/row_blocks.hpp"
#include "free_transformer/detail/settings.hpp"

FREE_TRANSFORMER_SMALL_CODE_BEGIN
namespace free_transformer::FREE_TRANSFORMER_DETAIL::plain {

/// All positions are one block here.
inline bool takes_few_operations(const at::Tensor& z_logits, const LatentSettings& settings) {
  return !z_logits.device().is_cpu() && !settings.prior_logits.defined() && z_logits.numel() > 0 &&
         z_logits.numel() <= block_elements(z_logits.device());
}

/// The KL of each bit and its derivative z p (1 - p), p = sigmoid(-|z|), in the widest type. The KL is log 2 -
/// log1p(exp(-|z|)) - |z| p, which cancels for small |z|. For logits of a narrower type than the widest it is clamped to
/// [z^2/8 - z^4/64, z^2/8], which encloses the KL: where the cancellation is worse than 2e-8 of it, the two are closer than
/// that. Beyond 800 the KL is log 2 and the derivative 0 in every type.
class BitsInFewOperations {
 public:
  BitsInFewOperations(const at::Tensor& z_logits, bool wants_derivative)
      : z_(z_logits.to(widest_type(z_logits.device())).clamp(-800, 800)),  // infinity times 0 would be a NaN
        is_narrow_(z_.scalar_type() == at::kDouble && z_logits.scalar_type() != at::kDouble),
        minus_(at::copysign(z_, -1.0)) {
    if (!is_narrow_) factors_ = at::empty({2, positions(), width()}, options());
    p_ = is_narrow_ ? at::empty_like(z_) : factors_.select(0, 1);
    at::sigmoid_out(p_, minus_);
    if (wants_derivative) derivative_ = at::sigmoid_backward(z_, p_);
  }

  void write_kl(at::Tensor kl) const {
    if (!is_narrow_) return write_kl_of_widest_type(kl);
    const at::Tensor far = at::rsub(at::softplus(minus_).addcmul_(minus_, p_, -1), std::log(2.0));
    const at::Tensor upper = z_.square().mul_(0.125);
    at::clamp_out(kl, far, at::addcmul(upper, upper, upper, -1), upper);
  }

  /// Undefined if it is not wanted. Whoever takes it may change it.
  const at::Tensor& derivative() const { return derivative_; }

  int64_t positions() const { return z_.size(0); }
  int64_t width() const { return z_.size(1); }
  at::TensorOptions options() const { return z_.options(); }

 private:
  /// With t = tanh(-|z|/2) the KL is (log1p(-t^2) - |z| t)/2, which keeps its digits for small |z|, and log1p(-t) - |z| p,
  /// which does for large: see `bernoulli_kl_uniform`. An operation for both at once is one launch.
  void write_kl_of_widest_type(at::Tensor& kl) const {
    at::Tensor forms = at::empty_like(factors_), near = forms.select(0, 0), far = forms.select(0, 1);
    at::Tensor t = factors_.select(0, 0);
    at::tanh_out(t, minus_ * 0.5);
    at::neg_out(far, t);
    at::mul_out(near, t, far);
    forms.log1p_().addcmul_(minus_, factors_);
    if (kl.is_meta()) return;  // where LibTorch 1.13 has no at::where
    at::where_out(kl, minus_ > -2, near.mul_(0.5), far);
  }

  at::Tensor z_;
  const bool is_narrow_;
  at::Tensor minus_, factors_, p_, derivative_;  // -|z|, t and p of the widest type's forms, p
};

/// A row for each position: what is summed of it in the order of `LatentSum`, then the KL of each bit. Where the weight
/// is 0 so are they, whatever the logits. The derivatives of the KL, if defined, become those of the weighted penalties.
class LatentTable {
 public:
  /// Without metrics only the penalty is written, and neither token_weight nor the hinge of the batch may be there.
  LatentTable(const BitsInFewOperations& bits, const LatentSettings& settings, kernels::Hinge hinge, bool has_metrics)
      : settings_(settings),
        hinge_(hinge),
        has_metrics_(has_metrics),
        derivative_(bits.derivative()),
        all_(at::empty({bits.positions(), latent_sum_count + bits.width()}, bits.options())) {
    const at::Tensor kl = all_.narrow(1, latent_sum_count, bits.width());
    bits.write_kl(kl);
    if (settings.token_weight.defined()) kl.masked_fill_(left_out(), 0);
    write_penalty(kl);
    if (has_metrics) {
      at::Tensor active = all_.select(1, active_sum);
      at::gt_out(active, penalty(), 0);
      all_.select(1, latent_weight_sum).fill_(1);
    }
    if (settings.token_weight.defined()) weigh();
  }

  /// The sums of all positions. The hinge of the batch looks at them, and so this comes before all else is asked.
  at::Tensor sums() {
    if (!has_metrics_) return penalty().sum().reshape({1});
    at::Tensor sums = all_.sum(0);
    if (hinge_ == kernels::Hinge::batch_mean) {
      const at::Tensor closed = mean_kl(sums) < settings_.free_bits;
      sums.select(0, penalty_sum).masked_fill_(closed, 0);
      penalty().masked_fill_(closed, 0);
      if (derivative_.defined()) derivative_.masked_fill_(closed, 0);
    }
    return sums;
  }

  at::Tensor penalty() const { return all_.select(1, penalty_sum); }
  const at::Tensor& derivative() const { return derivative_; }

 private:
  at::Tensor left_out() const { return (settings_.token_weight == 0).unsqueeze(1); }

  void write_penalty(const at::Tensor& kl) {
    at::Tensor penalty = this->penalty();
    if (hinge_ == kernels::Hinge::per_bit) {
      at::Tensor above = kl - settings_.free_bits;
      pass_hinge(above);
      at::sum_out(penalty, above.clamp_min_(0), 1);
      return;
    }
    at::sum_out(penalty, kl, 1);
    penalty.sub_(settings_.free_bits);
    if (hinge_ == kernels::Hinge::per_position) {
      pass_hinge(penalty.unsqueeze(1));
      penalty.clamp_min_(0);
    }
  }

  /// Closed below the budget alone: not at it, and not for a NaN.
  void pass_hinge(const at::Tensor& above_budget) {
    constexpr double just_below = -std::numeric_limits<float>::min();
    if (derivative_.defined()) at::threshold_backward_out(derivative_, derivative_, above_budget, just_below);
  }

  void weigh() {
    all_.mul_(settings_.token_weight.unsqueeze(1));
    if (derivative_.defined()) derivative_.mul_(settings_.token_weight.unsqueeze(1)).masked_fill_(left_out(), 0);
  }

  const LatentSettings& settings_;
  const kernels::Hinge hinge_;
  const bool has_metrics_;
  at::Tensor derivative_, all_;
};

/// The derivatives [N, latent_dim] times a factor, in the shape and the type of the logits.
inline at::Tensor scaled_gradient(const at::Tensor& derivative, const at::Tensor& factor, const at::Tensor& z_logits) {
  at::Tensor gradient = at::empty(z_logits.sizes(), z_logits.options());
  at::Tensor rows = gradient.view(derivative.sizes());
  at::mul_out(rows, derivative, factor);
  return gradient;
}

/// See the door's `latent_rows`.
inline LatentRows latent_rows_in_few_operations(kernels::Hinge hinge, const at::Tensor& z_logits,
                                                const LatentSettings& settings, const Normalization& normalization,
                                                const at::Tensor& scale, const at::Tensor& upstream,
                                                const WantedOfLatents& wanted) {
  const int64_t width = z_logits.size(-1), rows = z_logits.numel() / width;
  const bool knows_scale = !settings.token_weight.defined() && !normalization.tensor.defined();
  const bool has_metrics = wanted.metrics || !knows_scale || hinge == kernels::Hinge::batch_mean;
  const BitsInFewOperations bits(z_logits.detach().reshape({rows, width}), wanted.gradient || wanted.unscaled_gradient);
  LatentTable table(bits, settings, hinge, has_metrics);
  LatentRows result;
  result.scale = scale;
  const bool is_mean_of_rows = normalization.reduction == ReductionKind::mean && !normalization.number && !has_metrics;
  if (!scale.defined() && is_mean_of_rows) {
    result.loss = table.penalty().mean().to(arithmetic_type(z_logits.scalar_type()));
    result.sums = at::empty({0}, bits.options());
  } else if (!scale.defined() || hinge == kernels::Hinge::batch_mean) {
    result.sums = table.sums();
  }
  if (!scale.defined() && knows_scale) {  // a number of the host multiplies without an operation of its own
    const auto count = static_cast<double>(rows);
    result.scale = at::scalar_tensor(loss_scale(normalization, count, count), bits.options().device(at::kCPU));
  } else if (!scale.defined()) {
    const at::Tensor weight = result.sums[latent_weight_sum];
    result.scale = loss_scale(normalization, weight, weight);
  }
  if (wanted.penalty) result.penalty = table.penalty().to(arithmetic_type(z_logits.scalar_type())).contiguous();
  const at::Tensor& derivative = table.derivative();
  if (!derivative.defined()) return result;
  if (wanted.unscaled_gradient) {
    result.unscaled_gradient = derivative;
  } else {
    const at::Tensor factor = upstream.defined() ? (upstream * result.scale).unsqueeze(1) : result.scale;
    result.gradient = scaled_gradient(derivative, factor, z_logits);
  }
  return result;
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::plain
FREE_TRANSFORMER_SMALL_CODE_END
