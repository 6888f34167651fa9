/// The cross entropy of rows of logits and its gradient from the equation of reconstruction_loss.hpp, in LibTorch's operations
/// on float64, with how far arithmetic in steps of `arithmetic_step` may be off.
#pragma once

#include <ATen/ATen.h>

#include <cmath>

#include <free_transformer/reconstruction_loss.hpp>

#include "expected.hpp"
#include "tensors.hpp"

namespace fuzz {

/// Below it an exponential may be 0: the kernels' is below exp(-87).
inline double smallest_exponential(at::ScalarType type) { return 2 * smallest(arithmetic(type)); }

/// log Σ exp x and softmax of rows [N, V]: x - max = -distance, Σ exp(-distance) = 1 + others.
struct Softmax {
  at::Tensor is_sound;      ///< [N], no NaN, and a largest logit that is finite: elsewhere the rest means nothing
  at::Tensor logits;        ///< [N, V], capped
  at::Tensor logits_error;  ///< [N, 1]
  at::Tensor cap_slope, cap_slope_error;
  Expected surprise;     ///< [N, V], lse - x
  Expected probability;  ///< [N, V]
  Expected log_sum_exp;  ///< [N]
};

/// d tanh(x/c) c = 4 e/(1+e)², e = exp(-2|x|/c), whose relative error is that of its exponent: of its steps and of x.
inline void cap(Softmax& of, const at::Tensor& logits, double softcap, double step) {
  of.logits = logits;
  of.cap_slope = at::ones_like(logits);
  of.cap_slope_error = at::zeros_like(logits);
  if (!(softcap > 0)) return;
  const at::Tensor exponent = (2 / softcap * logits.abs()).clamp_max(746), e = (-exponent).exp();
  of.logits = softcap * (logits / softcap).tanh();
  of.cap_slope = 4 * e / (1 + e).square();
  const at::Tensor moved = (2 / softcap * of.logits_error).clamp_max(700).expm1();
  const at::Tensor relative = (16 + 2 * exponent) * step + moved;
  of.cap_slope_error = (relative * of.cap_slope).clamp_max(1) + 4 * smallest_exponential(at::kFloat);
  of.logits_error = of.logits_error + 6 * step * of.logits.abs().amax(-1, /*keepdim=*/true);
}

/// logits [N, V] and how far off those of the library may be, [N, 1].
inline Softmax softmax(const at::Tensor& logits, const at::Tensor& logits_error, double softcap, at::ScalarType type) {
  const double step = arithmetic_step(type);
  Softmax of;
  const at::Tensor is_missing = logits.isnan().any(-1, /*keepdim=*/true);
  of.logits_error = logits_error;
  cap(of, logits.masked_fill(is_missing, 0), softcap, step);
  at::Tensor maximum = of.logits.amax(-1, /*keepdim=*/true);
  const at::Tensor is_unsound = is_missing | (maximum.abs() == infinity);
  of.is_sound = is_unsound.logical_not().squeeze(-1);
  of.logits = of.logits.masked_fill(is_unsound, 0);
  of.logits_error = of.logits_error.masked_fill(is_unsound, 0);
  maximum = maximum.masked_fill(is_unsound, 0);

  const at::Tensor distance = maximum - of.logits;
  const at::Tensor exponential = (-distance).exp();
  const at::Tensor pivot = of.logits.argmax(-1, /*keepdim=*/true);
  const at::Tensor log_sum = exponential.scatter(1, pivot, 0).sum(-1, /*keepdim=*/true).log1p();
  // exp of a difference that is rounded by half a step of it, as far as exp is not 0; and of logits that are further off,
  // behind which a probability may soon be any
  const at::Tensor relative = (16 + distance.clamp_max(746)) * step, is_far_off = of.logits_error > 1;
  const at::Tensor probability = (-distance - log_sum).exp();
  const at::Tensor rounding = probability * relative + smallest_exponential(type);
  const at::Tensor moved = probability * (2 * of.logits_error.clamp_max(1)).expm1();
  const auto of_others = [&](const at::Tensor& all) { return all.scatter(1, pivot, 0).sum(-1, /*keepdim=*/true); };
  const at::Tensor of_log_sum =
      of_others(rounding) + 4 * step * log_sum + at::where(is_far_off, 2 * of.logits_error, of_others(moved));
  const at::Tensor of_probability = rounding + moved + probability * (of_log_sum + 16 * step);
  of.probability = {probability, at::where(is_far_off, at::ones_like(probability), of_probability)};
  const at::Tensor finite_distance = distance.masked_fill(distance == infinity, 0);
  of.surprise = {distance + log_sum, 4 * step * (finite_distance + log_sum) + of_log_sum + 2 * of.logits_error};
  of.log_sum_exp =
      Expected(maximum + log_sum, of_log_sum + step * (16 + 4 * (maximum.abs() + log_sum)) + of.logits_error)
          .reshape({-1});
  return of;
}

/// The terms of each position without its weight u and the normalizer: loss [N] and gradient [N, V].
struct CrossEntropyTerms {
  Softmax softmax;
  Expected likelihood, z, likelihood_gradient, z_gradient;
};

/// targets [N] int64, or [N, V] class probabilities.
inline CrossEntropyTerms cross_entropy_terms(const at::Tensor& logits, const at::Tensor& logits_error,
                                             const at::Tensor& targets,
                                             const free_transformer::ReconstructionLossOptions& options,
                                             at::ScalarType type) {
  const double step = arithmetic_step(type), smoothing = options.label_smoothing();
  const int64_t classes = logits.size(-1);
  CrossEntropyTerms of;
  of.softmax = softmax(logits, logits_error, options.softcap(), type);
  const bool has_probabilities = targets.dim() == 2;
  const at::Tensor is_target =
      has_probabilities ? at::zeros_like(logits, at::kBool) : targets.unsqueeze(1) == at::arange(classes);
  const at::Tensor q = has_probabilities ? targets.to(at::kDouble) : is_target.to(at::kDouble);
  const at::Tensor weight =
      options.weight().defined() ? options.weight().to(at::kDouble) : at::ones({classes}, at::kDouble);
  const at::Tensor share = weight * ((1 - smoothing) * q + smoothing / static_cast<double>(classes));
  const at::Tensor total = share.sum(-1, /*keepdim=*/true);
  const bool has_parts = has_probabilities || smoothing > 0 || options.z_loss() > 0 || options.softcap() > 0 ||
                         (logits_error > 0).any().item<bool>();  // else a confident model keeps its digits

  const auto& surprise = of.softmax.surprise;
  of.likelihood = surprise.times(share).only(share != 0).sum(/*of_rows=*/true);
  if (has_parts) of.likelihood.tolerance = of.likelihood.tolerance + 16 * step * total.squeeze(-1);
  const auto& lse = of.softmax.log_sum_exp;
  const double z = options.z_loss();
  of.z = {z * lse.value.square(),
          z * (2 * lse.value.abs() + lse.tolerance) * lse.tolerance + 4 * step * z * lse.value.square()};

  const auto& p = of.softmax.probability;
  const auto of_target = [&](const at::Tensor& others) {
    return (others.masked_fill(is_target, 0).sum(-1, /*keepdim=*/true) * share);
  };
  const at::Tensor parts = total * p.value + share;
  at::Tensor gradient = total * p.value - share, tolerance = total * p.tolerance;
  gradient = at::where(is_target, (total - share) * p.value - of_target(p.value), gradient);
  tolerance = at::where(is_target, (total - share) * p.tolerance + of_target(p.tolerance), tolerance);
  tolerance = tolerance + 16 * step * (has_parts ? parts : gradient.abs());
  of.likelihood_gradient = {gradient, tolerance};
  const auto column = [](const at::Tensor& values) { return values.unsqueeze(1); };
  of.z_gradient = {2 * z * column(lse.value) * p.value,
                   2 * z *
                       (column(lse.value.abs()) * (p.tolerance + 8 * step * p.value) +
                        column(lse.tolerance) * (p.value + p.tolerance))};
  for (Expected* all : {&of.likelihood_gradient, &of.z_gradient}) {
    all->tolerance = all->tolerance * (of.softmax.cap_slope + of.softmax.cap_slope_error) +
                     all->value.abs() * of.softmax.cap_slope_error;
    all->value = all->value * of.softmax.cap_slope;
  }

  // What a NaN or an infinite sum is multiplied by decides whether it counts.
  const at::Tensor is_unsound = of.softmax.is_sound.logical_not(), has_target = total.squeeze(-1) > 0;
  of.likelihood.value.masked_fill_(is_unsound & has_target, not_a_number);
  of.likelihood.value.masked_fill_(is_unsound & has_target.logical_not(), 0);
  if (z > 0) of.z.value.masked_fill_(is_unsound, not_a_number);
  const at::Tensor is_infinite = of.likelihood.value == infinity;
  of.likelihood_gradient = of.likelihood_gradient.known_where(column((is_unsound | is_infinite).logical_not()));
  of.z_gradient = of.z_gradient.known_where(column(of.softmax.is_sound));
  return of;
}

}  // namespace fuzz
