/// The free-bits KL from the uniform prior with one of the library's hinges on a device, where each operation is a launch:
/// as few of them as keep the promises.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <cstdint>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/hinge.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/plain/row_blocks.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::plain {

/// All positions are one block here.
inline bool takes_few_operations(const at::Tensor& z_logits, const LatentSettings& settings) {
  return !z_logits.device().is_cpu() && !settings.prior_logits.defined() && z_logits.numel() > 0 &&
         z_logits.numel() <= block_elements(z_logits.device());
}

/// The KL of each bit and its derivative z p (1 - p), p = sigmoid(-|z|), in the widest type. See `bernoulli_kl_uniform`
/// for the KL: log 2 - log1p(exp(-|z|)) - |z| p cancels for small |z|. There it is u t + log1p(-t^2)/2 with u = |z|/2,
/// t = tanh u, or for logits of a narrower type than float64 z^2/8 - z^4/64, whose next term is below 1e-9 of it where |z| < 1/64.
/// Beyond 800 the KL is log 2 and the derivative 0 in every type.
class BitsInFewOperations {
 public:
  BitsInFewOperations(const at::Tensor& z_logits, bool wants_derivative)
      : z_(z_logits.to(widest_type(z_logits.device())).clamp(-800, 800)),  // infinity times 0 would be a NaN
        is_narrow_(z_.scalar_type() == at::kDouble && z_logits.scalar_type() != at::kDouble) {
    minus_ = at::minimum(z_, z_.neg());
    p_ = minus_.sigmoid();
    if (wants_derivative) derivative_ = at::sigmoid_backward(z_, p_);
  }

  void write_kl(at::Tensor kl) const {
    const at::Tensor far = at::rsub(at::softplus(minus_).addcmul_(minus_, p_, -1), std::log(2.0));
    const at::Tensor near = is_narrow_ ? series() : by_tanh();
    if (kl.is_meta()) return;  // where LibTorch 1.13 has no at::where
    at::where_out(kl, minus_ > (is_narrow_ ? -1.0 / 64 : -2.0), near, far);
  }

  /// Undefined if it is not wanted.
  const at::Tensor& derivative() const { return derivative_; }

  int64_t positions() const { return z_.size(0); }
  int64_t width() const { return z_.size(1); }
  at::TensorOptions options() const { return z_.options(); }

 private:
  at::Tensor series() const {
    const at::Tensor eighth = z_.square().mul_(0.125);
    return at::addcmul(eighth, eighth, eighth, -1);
  }
  at::Tensor by_tanh() const {
    const at::Tensor u = minus_ * 0.5, t = u.tanh();  // both are odd
    return (u * t).add_(t.square().neg_().log1p_(), /*alpha=*/0.5);
  }

  at::Tensor z_;
  const bool is_narrow_;
  at::Tensor minus_, p_, derivative_;  // -|z|, sigmoid(-|z|)
};

/// A row for each position: what is summed of it in the order of `LatentSum`, then the KL of each bit. Where the weight
/// is 0 so are they, whatever the logits.
class LatentTable {
 public:
  LatentTable(const BitsInFewOperations& bits, const LatentSettings& settings, kernels::Hinge hinge)
      : settings_(settings),
        hinge_(hinge),
        all_(at::empty({bits.positions(), latent_sum_count + bits.width()}, bits.options())) {
    const at::Tensor kl = all_.narrow(1, latent_sum_count, bits.width());
    bits.write_kl(kl);
    if (settings.token_weight.defined()) kl.masked_fill_(left_out(), 0);
    write_penalty(kl);
    all_.select(1, latent_weight_sum).fill_(1);
    if (settings.token_weight.defined()) all_.mul_(settings.token_weight.unsqueeze(1));
  }

  /// The sums of all positions. The hinge of the batch looks at them, and so this comes before all else is asked.
  at::Tensor sums() {
    const at::Tensor sums = all_.sum(0);
    if (hinge_ == kernels::Hinge::batch_mean) {
      closed_ = sums.slice(0, latent_sum_count).sum() / sums[latent_weight_sum] < settings_.free_bits;
      sums.select(0, penalty_sum).masked_fill_(closed_, 0);
      penalty().masked_fill_(closed_, 0);
    }
    return sums;
  }

  at::Tensor penalty() const { return all_.select(1, penalty_sum); }

  /// Turns the derivatives of the KL into those of the weighted penalties.
  void pass_hinge(const at::Tensor& derivative) const {
    derivative.masked_fill_(closed_, 0);
    if (settings_.token_weight.defined()) {
      derivative.mul_(settings_.token_weight.unsqueeze(1)).masked_fill_(left_out(), 0);
    }
  }

 private:
  at::Tensor left_out() const { return (settings_.token_weight == 0).unsqueeze(1); }

  void write_penalty(const at::Tensor& kl) {
    at::Tensor penalty = this->penalty(), active = all_.select(1, active_sum);
    if (hinge_ == kernels::Hinge::per_bit) {
      const at::Tensor above = kl - settings_.free_bits;
      closed_ = above < 0;
      at::sum_out(penalty, above.masked_fill_(closed_, 0), 1);
    } else {
      at::sum_out(penalty, kl, 1);
      penalty.sub_(settings_.free_bits);
    }
    if (hinge_ == kernels::Hinge::per_position) {
      closed_ = (penalty < 0).unsqueeze(1);
      penalty.masked_fill_(closed_.squeeze(1), 0);
    }
    at::gt_out(active, penalty, 0);
  }

  const LatentSettings& settings_;
  const kernels::Hinge hinge_;
  at::Tensor all_;
  at::Tensor closed_;  ///< where the hinge lets no gradient through
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
  const BitsInFewOperations bits(z_logits.detach().reshape({rows, width}), wanted.gradient || wanted.unscaled_gradient);
  LatentTable table(bits, settings, hinge);
  LatentRows result;
  result.scale = scale;
  if (!scale.defined() || hinge == kernels::Hinge::batch_mean) result.sums = table.sums();
  if (!scale.defined()) {
    const at::Tensor weight = result.sums[latent_weight_sum];
    const bool is_count = normalization.reduction == ReductionKind::mean && !normalization.number &&
                          !normalization.tensor.defined() && !settings.token_weight.defined();
    result.scale = is_count ? at::full({}, 1.0 / static_cast<double>(rows), weight.options())
                            : loss_scale(normalization, weight, weight);
  }
  if (wanted.penalty) result.penalty = table.penalty().to(arithmetic_type(z_logits.scalar_type())).contiguous();
  const at::Tensor& derivative = bits.derivative();
  if (!derivative.defined()) return result;
  table.pass_hinge(derivative);
  if (wanted.unscaled_gradient) {
    result.unscaled_gradient = derivative;
  } else {
    const at::Tensor factor = upstream.defined() ? (upstream * result.scale).unsqueeze(1) : result.scale;
    result.gradient = scaled_gradient(derivative, factor, z_logits);
  }
  return result;
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::plain
