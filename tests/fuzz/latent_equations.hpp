/// The KL of latent bits from their prior and its gradients from the equation of kl_divergence.hpp, in LibTorch's operations
/// on float64.
#pragma once

#include <ATen/ATen.h>

#include <cmath>

#include "expected.hpp"
#include "tensors.hpp"

namespace fuzz {

/// Of each bit, [N, H].
struct BitKL {
  Expected value, gradient, prior_gradient;
};

/// From the uniform prior. Where log 2 - entropy would cancel, the series of its derivative l/4 sech²(l/2): its next term is less
/// than 1e-14 of the first. Tolerances are the two and four ulp of float32 that are promised; float64 has no such promise.
inline BitKL kl_from_uniform(const at::Tensor& l, at::ScalarType type) {
  const at::Tensor magnitude = l.abs(), e = (-magnitude).exp(), square = l.square();
  const at::Tensor moved = at::where(e == 0, 0.0, magnitude * e);
  const at::Tensor far = std::log(2.0) - e.log1p() - moved / (1 + e);
  const at::Tensor near = square / 8 * (1 - square / 8 * (1 - square / 9 * (1 - square * (17.0 / 160))));
  const at::Tensor kl = at::where(magnitude < 0.05, near, far);
  const at::Tensor slope = l.sign() * moved / (1 + e).square();
  const double relative = type == at::kDouble ? 1e-11 : 2 * epsilon(at::kFloat) + 1e-11;
  const double underflow = (type == at::kDouble ? 800 : 90) * smallest(arithmetic(type));
  return {{kl, relative * kl}, {slope, 2 * relative * slope.abs() + underflow}, {}};
}

/// From a prior of logits r: σ(l)(l - r) + softplus(r) - softplus(l), of which float64 loses what cancels.
inline BitKL kl_from_prior(const at::Tensor& l, const at::Tensor& r, at::ScalarType type) {
  const double step = arithmetic_step(type);
  const auto softplus = [](const at::Tensor& x) { return x.clamp_min(0) + (-x.abs()).exp().log1p(); };
  const at::Tensor is_sure = l.abs() == infinity, prior_is_sure = r.abs() == infinity;
  const at::Tensor a = l.masked_fill(is_sure, 0), b = r.masked_fill(prior_is_sure, 0), sigmoid = a.sigmoid();
  at::Tensor kl = (sigmoid * (a - b) + softplus(b) - softplus(a)).clamp_min(0);
  kl = at::where(is_sure, softplus(-l.sign() * b), kl);
  kl = at::where(prior_is_sure, at::where(l == r, at::zeros_like(kl), at::full_like(kl, infinity)), kl);
  kl.masked_fill_(l.isnan() | r.isnan(), not_a_number);
  const at::Tensor size = 1 + a.abs() + b.abs();
  const at::Tensor slope = ((a - b) * sigmoid * (-a).sigmoid()).masked_fill(is_sure, 0);
  const at::Tensor prior_slope = r.sigmoid() - l.sigmoid();
  const at::Tensor is_known = prior_is_sure.logical_not();
  // beside a sure prior a logit that leaves the other bit a probability of 0 in float64 may be as sure
  const at::Tensor is_doubtful = prior_is_sure & is_sure.logical_not() & (l * r > 0) & (l.abs() > 700);
  return {{kl, (4 * step + 1e-10) * kl + 1e-15 * size, is_doubtful.logical_not()},
          {slope, (4 * step + 1e-12 * size) * slope.abs() + 1e-300, is_known},
          {prior_slope, 4 * step * prior_slope.abs() + 1e-15, is_known}};
}

/// Whether max(0, kl - budget) is open, where rounding does not decide.
struct Gate {
  at::Tensor is_open, is_known;
};

inline Gate gate(const Expected& kl, double budget, double step) {
  const at::Tensor excess = kl.value - budget;
  return {(excess < 0).logical_not(),
          (excess.abs() <= 2 * (kl.tolerance + step * (kl.value.abs() + budget))).logical_not()};
}

inline Expected excess(const Expected& kl, double budget, double step) {
  return {kl.value - budget, kl.tolerance + 8 * step * (kl.value.abs() + budget), kl.is_known};
}

/// What of `excess` a gate lets through; near it that is 0 or hardly more.
inline Expected through(const Gate& gate, const Expected& excess) {
  return {at::where(gate.is_open, excess.value, at::zeros_like(excess.value)), excess.tolerance, excess.is_known};
}

enum class Policy { per_position, per_bit, batch_mean };

struct LatentTerms {
  Expected penalty;                   ///< [N]
  Expected gradient, prior_gradient;  ///< [N, H]
};

/// weight: [N], that of each position in the mean of a batch.
inline LatentTerms latent_terms(const BitKL& bits, const at::Tensor& weight, double budget, Policy policy,
                                at::ScalarType type) {
  const double step = arithmetic_step(type);
  const Expected of_positions = bits.value.sum(/*of_rows=*/true);
  LatentTerms of{{}, bits.gradient, bits.prior_gradient};
  Gate gradient_gate;  // [N, H], or what expands to it
  if (policy == Policy::per_bit) {
    gradient_gate = gate(bits.value, budget, step);
    of.penalty = through(gradient_gate, excess(bits.value, budget, step)).sum(/*of_rows=*/true);
  } else {
    Expected judged = of_positions;
    if (policy == Policy::batch_mean) {
      const at::Tensor total = weight.sum();
      judged = of_positions.only(weight > 0).times(weight / at::where(total > 0, total, at::ones_like(total))).sum();
    }
    const Gate of_judged = gate(judged, budget, step);
    of.penalty = through(of_judged, excess(of_positions, budget, step));
    if (policy == Policy::batch_mean) of.penalty = of.penalty.known_where(of_judged.is_known);
    const at::Tensor is_known =
        of_judged.is_known & judged.value.isfinite();  // a NaN or infinity reaches all behind its gate
    gradient_gate = {of_judged.is_open.unsqueeze(-1), is_known.unsqueeze(-1)};
  }
  for (Expected* gradient : {&of.gradient, &of.prior_gradient}) {
    if (!gradient->value.defined()) continue;
    const at::Tensor is_open = gradient_gate.is_open.expand_as(gradient->value);
    *gradient = gradient->only(is_open).known_where(gradient_gate.is_known & bits.value.value.isfinite());
  }
  return of;
}

}  // namespace fuzz
