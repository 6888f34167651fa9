/// The KL of one latent bit from its prior, from the equation of kl_divergence.hpp, in long double.
#pragma once

#include <cmath>
#include <limits>

#include "../exhaustive/exact.hpp"
#include "expected.hpp"

namespace fuzz {

inline Real logistic(Real x) { return 1 / (1 + std::exp(-x)); }

inline Real softplus(Real x) { return std::max<Real>(x, 0) + std::log1p(std::exp(-std::abs(x))); }

struct BitKL {
  Expected value, gradient, prior_gradient;
};

/// KL(Bernoulli(sigmoid(l)) || Bernoulli(1/2)): within 2 steps, its derivative within 4.
inline BitKL kl_of_bit(Real l, at::ScalarType type) {
  if (std::isnan(l)) return {{l, 0, true}, {0, 0, false}, {}};
  const Real magnitude = std::abs(l), value = exhaustive::kl(magnitude);
  const Real slope = std::isinf(l) ? 0 : std::copysign(exhaustive::kl_derivative(magnitude), l);
  const Real steps = (type == at::kDouble ? 16 + std::min<Real>(magnitude, 746) : 4) * epsilon(type);
  return {{value, steps * value, true}, {slope, steps * std::abs(slope), true}, {}};
}

/// The same for a prior's logit r: log of the odds' ratio, and what is left of cancellation in float64.
inline BitKL kl_of_bit(Real l, Real r, at::ScalarType type) {
  if (std::isnan(l) || std::isnan(r)) {
    return {{std::numeric_limits<Real>::quiet_NaN(), 0, true}, {0, 0, false}, {0, 0, false}};
  }
  BitKL of;
  if (std::isinf(l)) {
    of.value.value = std::isinf(r) && (r > 0) == (l > 0) ? 0 : softplus(l > 0 ? -r : r);
  } else if (std::isinf(r)) {
    of.value.value = std::numeric_limits<Real>::infinity();
    of.gradient.is_known = of.prior_gradient.is_known = false;
    return of;
  } else {
    of.value.value = std::max<Real>(0, logistic(l) * (l - r) + softplus(r) - softplus(l));
    of.gradient.value = (l - r) * logistic(l) * logistic(-l);
  }
  of.prior_gradient.value = logistic(r) - logistic(l);
  const Real size = 1 + (std::isinf(l) ? 0 : std::abs(l)) + (std::isinf(r) ? 0 : std::abs(r));
  of.value.tolerance = (4 * epsilon(type) + 1e-10L) * of.value.value + 2e-16L * size;
  of.gradient.tolerance = (4 * epsilon(type) + 1e-12L * size) * std::abs(of.gradient.value) + 1e-300L;
  of.prior_gradient.tolerance = 4 * epsilon(type) * std::abs(of.prior_gradient.value) + 1e-15L;
  return of;
}

}  // namespace fuzz
