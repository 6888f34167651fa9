/// Cross entropy of one row from its equation (see `CrossEntropySettings`), with what rounding to float32 may do to it.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "numbers.hpp"

namespace emulation {

struct RowSettings {
  int64_t target = 0;
  Real token_weight = 1;  ///< 0: left out
  std::vector<float> class_weight;
  Real label_smoothing = 0, z_loss = 0, softcap = 0;
  Real likelihood_scale = 1, z_scale = 1, upstream = 1;
};

struct RowResult {
  Real loss = 0, nll = 0, likelihood_loss = 0, log_sum_exp = 0, entropy = 0;
  Real nll_tolerance = 0, likelihood_tolerance = 0, log_sum_tolerance = 0, entropy_tolerance = 0, loss_tolerance = 0;
  int64_t prediction = 0;
  std::vector<Real> gradient, tolerance;  ///< [columns]
};

inline RowResult row_without_value(size_t columns, Real value) {
  RowResult row;
  row.loss = row.nll = row.likelihood_loss = row.log_sum_exp = row.entropy = value;
  row.gradient.assign(columns, value);
  row.tolerance.assign(columns, 0);
  return row;
}

/// A logit is known to within a rounding or two once it is capped, and its difference to the largest is rounded; both
/// move an exponential by as much, relatively. A sum is as uncertain as its terms.
inline RowResult reference_row(const std::vector<float>& logits, const RowSettings& settings) {
  const size_t columns = logits.size();
  if (settings.token_weight == 0) return row_without_value(columns, 0);
  if (settings.target < 0 || settings.target >= static_cast<int64_t>(columns)) {
    return row_without_value(columns, quiet_nan);
  }
  const auto target = static_cast<size_t>(settings.target);
  const Real cap = settings.softcap;
  std::vector<Real> x(columns), slope(columns, 1), slope_tolerance(columns, 0), uncertainty(columns, 0);
  Real largest = -Real(infinite);
  bool is_nan = false;
  RowResult row;
  for (size_t c = 0; c < columns; ++c) {
    x[c] = logits[c];
    if (cap > 0) {
      x[c] = cap * std::tanh(x[c] / cap);
      const Real decay = std::exp(-2 * std::fabs(Real(logits[c])) / cap);
      slope[c] = 4 * decay / ((1 + decay) * (1 + decay));
      slope_tolerance[c] = slope[c] * epsilon * (std::isinf(logits[c]) ? 0 : 4 * std::fabs(Real(logits[c])) / cap + 12);
      uncertainty[c] = 6 * std::fabs(x[c]);
    }
    is_nan = is_nan || std::isnan(x[c]) || x[c] == Real(infinite);
    if (x[c] > largest) {
      largest = x[c];
      row.prediction = static_cast<int64_t>(c);
    }
  }
  const auto weight_of = [&](size_t c) {
    return settings.class_weight.empty() ? Real(1) : Real(settings.class_weight[c]);
  };
  const Real target_weight = weight_of(target);
  if (is_nan || std::isinf(largest)) {
    row = row_without_value(columns, quiet_nan);
    bool has_weight = target_weight > 0;
    for (size_t c = 0; c < columns && settings.label_smoothing > 0; ++c) has_weight = has_weight || weight_of(c) > 0;
    if (!has_weight) {
      row.likelihood_loss = 0;
      if (settings.z_loss == 0) {
        row.loss = 0;
        if (settings.label_smoothing == 0)
          row.gradient.assign(columns, 0);  // else the kernel does not look for weights
      }
    }
    return row;
  }
  Real largest_uncertainty = cap > 0 ? 6 * std::fabs(largest) : 0;
  Real others = 0, others_tolerance = 0, surprise_of_prediction = 0, surprise_tolerance = 0;
  std::vector<Real> exponential(columns), relative(columns);
  for (size_t c = 0; c < columns; ++c) {
    exponential[c] = std::exp(x[c] - largest);
    if (exponential[c] == 0) continue;
    relative[c] = 2 * std::fabs(x[c] - largest) + 10 + uncertainty[c] + largest_uncertainty;
    surprise_of_prediction += exponential[c] * (largest - x[c]);
    surprise_tolerance += exponential[c] * ((largest - x[c]) * relative[c] + uncertainty[c] + largest_uncertainty);
    if (c == target) continue;
    others += exponential[c];
    others_tolerance += exponential[c] * relative[c] * epsilon + 0x1p-120L;
  }
  const Real sum = others + exponential[target];
  const Real sum_tolerance = others_tolerance + exponential[target] * relative[target] * epsilon;
  const bool is_largest = x[target] == largest;
  const Real log_sum = is_largest ? std::log1p(others) : std::log(sum);
  const Real log_tolerance =
      (is_largest ? others_tolerance / (1 + others) : sum_tolerance / sum) + 4 * epsilon * log_sum;
  row.log_sum_exp = largest + log_sum;
  row.log_sum_tolerance = log_tolerance + epsilon * (std::fabs(row.log_sum_exp) + largest_uncertainty + log_sum);
  row.nll = log_sum + (largest - x[target]);
  const Real rise_tolerance = is_largest ? 0 : epsilon * (uncertainty[target] + largest_uncertainty);
  row.nll_tolerance = log_tolerance + rise_tolerance + 2 * epsilon * row.nll;
  row.entropy = log_sum + surprise_of_prediction / sum;
  row.entropy_tolerance = log_tolerance + epsilon * surprise_tolerance / sum +
                          surprise_of_prediction / sum * sum_tolerance / sum + 4 * epsilon * row.entropy;

  const Real share = settings.label_smoothing / static_cast<Real>(columns);
  row.likelihood_loss = target_weight == 0 ? 0 : (1 - settings.label_smoothing) * target_weight * row.nll;
  row.likelihood_tolerance = target_weight == 0 ? 0 : target_weight * row.nll_tolerance;
  Real weight_sum = 0;
  for (size_t c = 0; c < columns && share > 0; ++c) {
    weight_sum += weight_of(c);
    if (weight_of(c) == 0) continue;
    row.likelihood_loss += share * weight_of(c) * (log_sum + (largest - x[c]));
    row.likelihood_tolerance +=
        share * weight_of(c) *
        (log_tolerance + epsilon * (8 * (largest - x[c]) + uncertainty[c] + largest_uncertainty));
  }
  row.likelihood_tolerance += 2 * epsilon * row.likelihood_loss;
  row.loss = settings.token_weight * row.likelihood_loss;
  row.loss_tolerance = settings.token_weight * row.likelihood_tolerance + 2 * epsilon * row.loss;
  if (settings.z_loss > 0) {
    const Real z = settings.z_loss * row.log_sum_exp * row.log_sum_exp * settings.token_weight;
    row.loss += z;
    row.loss_tolerance +=
        2 * settings.z_loss * std::fabs(row.log_sum_exp) * row.log_sum_tolerance * settings.token_weight +
        4 * epsilon * z;
  }

  const Real of_token = settings.token_weight * settings.upstream;
  const Real likelihood = of_token * settings.likelihood_scale;
  const Real target_part = likelihood * (1 - settings.label_smoothing) * target_weight;
  const Real of_z = 2 * of_token * settings.z_scale * settings.z_loss * row.log_sum_exp;
  const Real of_z_tolerance = 2 * of_token * settings.z_scale * settings.z_loss * row.log_sum_tolerance;
  const Real beside = of_z + likelihood * share * weight_sum;
  row.gradient.resize(columns);
  row.tolerance.resize(columns);
  for (size_t c = 0; c < columns; ++c) {
    const Real p = exponential[c] / sum;
    const Real p_tolerance = p * (epsilon * (relative[c] + 8) + sum_tolerance / sum) + 0x1p-120L;
    const Real spread = likelihood * share * weight_of(c);
    Real gradient = (c == target ? beside : target_part + beside) * p - spread;
    Real tolerance = std::fabs(c == target ? beside : target_part + beside) * p_tolerance + of_z_tolerance * p +
                     4 * epsilon * std::fabs(spread);
    if (c == target) {
      const Real rest = others / sum;  // 1 - p_y
      gradient -= target_part * rest;
      tolerance += std::fabs(target_part) * (others_tolerance / sum + rest * (sum_tolerance / sum + 8 * epsilon));
    }
    row.gradient[c] = gradient * slope[c];
    row.tolerance[c] =
        tolerance * slope[c] + std::fabs(gradient) * slope_tolerance[c] + 4 * epsilon * std::fabs(row.gradient[c]);
  }
  if (target_weight == 0 && share == 0 && settings.z_loss == 0) {
    row.gradient.assign(columns, 0);
    row.tolerance.assign(columns, 0);
  }
  return row;
}

}  // namespace emulation
