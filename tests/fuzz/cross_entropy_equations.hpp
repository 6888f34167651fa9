/// The cross entropy of one position and its gradient from the equation of reconstruction_loss.hpp, in long double, with how
/// far arithmetic in steps of epsilon may be off.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "expected.hpp"

namespace fuzz {

struct CrossEntropyTerms {
  double label_smoothing = 0, z_loss = 0, softcap = 0;
  Reals class_weight;  ///< empty for 1

  Real weight_of(size_t column) const { return class_weight.empty() ? 1 : class_weight[column]; }
  bool has_options() const { return label_smoothing > 0 || z_loss > 0 || softcap > 0; }
};

struct CrossEntropyRow {
  Expected likelihood, z;
  AllExpected likelihood_gradient, z_gradient;
};

/// x is one row of logits, each off by `logit_error`; `probabilities` stands for the target where it is not empty.
inline CrossEntropyRow cross_entropy_of_row(const Reals& logits, int64_t target, const Reals& probabilities,
                                            const CrossEntropyTerms& terms, at::ScalarType type,
                                            Real logit_error = 0) {
  constexpr Real infinity = std::numeric_limits<Real>::infinity(), nan = std::numeric_limits<Real>::quiet_NaN();
  const size_t columns = logits.size();
  const Real step = epsilon(type), smallest_exp = type == at::kDouble ? 1e-300L : 2e-38L;
  Reals x = logits, slope(columns, 1), coefficient(columns);
  Real error = logit_error;
  for (size_t c = 0; c < columns; ++c) {
    const Real share = terms.label_smoothing / static_cast<Real>(columns);
    const Real q = probabilities.empty() ? Real(static_cast<int64_t>(c) == target) : probabilities[c];
    coefficient[c] = terms.weight_of(c) * ((1 - static_cast<Real>(terms.label_smoothing)) * q + share);
    if (!probabilities.empty() || !(terms.label_smoothing > 0)) {
    } else if (static_cast<int64_t>(c) == target) {
      coefficient[c] = terms.weight_of(c) * (1 - static_cast<Real>(terms.label_smoothing) + share);
    }
    if (terms.softcap > 0) {
      const Real ratio = logits[c] / terms.softcap, decay = std::exp(-2 * std::abs(ratio));
      x[c] = terms.softcap * std::tanh(ratio);
      slope[c] = 4 * decay / ((1 + decay) * (1 + decay));
      if (std::isfinite(x[c])) error = std::max(error, logit_error + 6 * step * std::abs(x[c]));
    }
  }
  CrossEntropyRow row;
  row.likelihood_gradient.resize(columns);
  row.z_gradient.resize(columns);
  const auto unknown = [&](Real loss) {
    row.likelihood = {loss, 0, true};
    row.z = {std::isnan(loss) ? loss : 0, 0, true};
    for (size_t c = 0; c < columns; ++c) row.likelihood_gradient[c].is_known = row.z_gradient[c].is_known = false;
    return row;
  };
  Real maximum = -infinity, spread = 0;
  for (const Real value : x) {
    if (std::isnan(value)) return unknown(nan);
    maximum = std::max(maximum, value);
  }
  if (std::isinf(maximum)) return unknown(nan);
  Real sum_of_others = 0;  // beside one largest
  bool is_passed = false;
  for (const Real value : x) {
    if (!is_passed && value == maximum) {
      is_passed = true;
      continue;
    }
    sum_of_others += std::exp(value - maximum);
    if (std::isfinite(value)) spread = std::max(spread, maximum - value);
  }
  const Real log_sum = std::log1p(sum_of_others), log_sum_exp = maximum + log_sum;
  // exp of a difference that is rounded by half a step: off by half a step of the difference, as far as exp is not 0
  const Real relative = (16 + std::min<Real>(spread, type == at::kDouble ? 746 : 88)) * step;
  Real total = 0;
  for (size_t c = 0; c < columns; ++c) {
    total += coefficient[c];
    if (!(coefficient[c] > 0)) continue;
    row.likelihood.value += coefficient[c] * (maximum - x[c] + log_sum);
  }
  if (std::isinf(row.likelihood.value)) return unknown(infinity);
  const Real flushed = smallest_exp * static_cast<Real>(columns);
  row.likelihood.tolerance = relative * row.likelihood.value + total * (2 * error + flushed);
  const Real z_loss = terms.z_loss, lse_error = error + 4 * step * std::abs(maximum) + relative * log_sum + flushed;
  row.z.value = z_loss * log_sum_exp * log_sum_exp;
  row.z.tolerance = z_loss * (2 * std::abs(log_sum_exp) + lse_error) * lse_error + 4 * step * row.z.value;
  const bool has_parts = terms.has_options() || !probabilities.empty() || logit_error > 0;
  const Real of_logits = std::expm1(2 * error);
  for (size_t c = 0; c < columns; ++c) {
    const Real p = std::exp(x[c] - log_sum_exp);
    Real others = 0;
    const bool is_target = static_cast<int64_t>(c) == target && probabilities.empty();
    if (is_target) {
      for (size_t other = 0; other < columns; ++other) others += other == c ? 0 : std::exp(x[other] - log_sum_exp);
    }
    Expected& of_likelihood = row.likelihood_gradient[c];
    of_likelihood.value = is_target ? (total - coefficient[c]) * p - coefficient[c] * others : total * p - coefficient[c];
    const Real parts = has_parts ? total * p + coefficient[c] : std::abs(of_likelihood.value);
    of_likelihood.tolerance = relative * parts + of_logits * (total * p + coefficient[c] * (1 - p)) + 2 * total * flushed;
    Expected& of_z = row.z_gradient[c];
    of_z.value = 2 * z_loss * log_sum_exp * p;
    of_z.tolerance = (relative + of_logits) * std::abs(of_z.value) + 2 * z_loss * (lse_error * p + std::abs(log_sum_exp) * flushed);
    if (terms.softcap > 0) {
      const Real decays = std::min<Real>(2 * std::abs(logits[c]) / terms.softcap, 746);
      const Real slope_error = (16 + 2 * decays) * step * slope[c] + 4 * smallest_exp;
      for (Expected* of : {&of_likelihood, &of_z}) {
        of->tolerance = of->tolerance * slope[c] + std::abs(of->value) * slope_error;
        of->value *= slope[c];
      }
    }
  }
  return row;
}

}  // namespace fuzz
