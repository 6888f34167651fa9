/// Cross entropy of one row of logits and its gradient, in vector code.
///
/// A row is read once, 512 columns at a time: they are widened or capped into the first-level cache, their largest is found
/// there, and exp(x - largest so far) and its sum are made, one exp an element. With a gradient wanted, the exponentials
/// go to the gradient's row (float32) or to a row of scratch (half types, a cap), and are multiplied by the row's factor
/// once that is known. So memory sees the logits read once and the gradient written once, and a cache of the second level
/// one more row. The sum is kept in float32 for 512 columns and in float64 beyond; it leaves out the target's class, so
/// that a confident row keeps its relative accuracy. Nothing is read or written behind the row's end: what is no whole
/// vector is computed in the first-level cache, padded with -inf.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/cross_entropy_job.hpp"
#include "free_transformer/detail/kernels/vector/elements.hpp"
#include "free_transformer/detail/kernels/vector/exponential.hpp"
#include "free_transformer/detail/kernels/vector/lanes.hpp"
#include "free_transformer/detail/kernels/vector/logarithm.hpp"
#include "free_transformer/detail/numbers.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

/// Four vectors in flight hide the latency of additions and products.
inline constexpr int in_flight = 4;

template <int lanes>
[[gnu::always_inline]] inline float exponential(float x) {
  Lanes<lanes> values = broadcast<lanes>(x);
  exponentiate<lanes>(values);
  float first;
  std::memcpy(&first, &values.values, sizeof(first));
  return first;
}

/// The largest of whole vectors of logits.
template <int lanes>
[[gnu::always_inline]] inline float largest_of(const float* logits, int64_t count) {
  Lanes<lanes> largest[in_flight], values;
  for (auto& of : largest) of = broadcast<lanes>(-std::numeric_limits<float>::infinity());
  int64_t column = 0;
  for (; column + in_flight * lanes <= count; column += in_flight * lanes) {
#pragma GCC unroll 4
    for (int k = 0; k < in_flight; ++k) {
      load<lanes>(logits + column + k * lanes, values);
      take_larger<lanes>(largest[k], values);
    }
  }
  for (; column < count; column += lanes) {
    load<lanes>(logits + column, values);
    take_larger<lanes>(largest[0], values);
  }
  for (int k = 1; k < in_flight; ++k) take_larger<lanes>(largest[0], largest[k]);
  return largest_lane<lanes>(largest[0]);
}

/// exp(x - reference) of whole vectors of logits, and their sum. The target may be the logits.
template <int lanes>
[[gnu::always_inline]] inline float exponentials_of(const float* logits, int64_t count, float reference,
                                                    float* target) {
  Lanes<lanes> sums[in_flight], values;
  for (auto& sum : sums) sum = broadcast<lanes>(0.0f);
  int64_t column = 0;
  for (; column + in_flight * lanes <= count; column += in_flight * lanes) {
#pragma GCC unroll 4
    for (int k = 0; k < in_flight; ++k) {
      load<lanes>(logits + column + k * lanes, values);
      values.values -= reference;
      exponentiate<lanes>(values);
      store<lanes>(values, target + column + k * lanes);
      sums[k].values += values.values;
    }
  }
  for (; column < count; column += lanes) {
    load<lanes>(logits + column, values);
    values.values -= reference;
    exponentiate<lanes>(values);
    store<lanes>(values, target + column);
    sums[0].values += values.values;
  }
  sums[0].values += sums[1].values;
  sums[2].values += sums[3].values;
  sums[0].values += sums[2].values;
  return sum_of_lanes<lanes>(sums[0]);
}

/// c tanh(x/c) of whole vectors, and its slope 1 - tanh^2. With s = exp(-2|x/c|), tanh = (1-s)/(1+s) and the slope is
/// 4s/(1+s)^2; for |x/c| < 0.625 the series of tanh keeps the digits that 1-s would lose (fitted by
/// tests/reference/fit_polynomials.py, relative error 5e-9).
template <int lanes>
[[gnu::always_inline]] inline void cap(float* logits, int64_t count, float limit, float* slopes) {
  using Values = typename Lanes<lanes>::Values;
  for (int64_t column = 0; column < count; column += lanes) {
    Lanes<lanes> x;
    load<lanes>(logits + column, x);
    const Values ratio = x.values / limit;
    const Values magnitude = ratio < 0 ? -ratio : ratio;
    Lanes<lanes> decay{magnitude * -2.0f};
    exponentiate<lanes>(decay);
    const Values inverse = 1.0f / (1.0f + decay.values);
    const Values far = (1.0f - decay.values) * inverse;
    const Values square = magnitude * magnitude;
    Values near = square * -5.692296196e-03f + 2.062816732e-02f;
    near = near * square - 5.373651534e-02f;
    near = near * square + 1.333140582e-01f;
    near = near * square - 3.333328068e-01f;
    near = near * square * magnitude + magnitude;
    const Values tanh = magnitude < 0.625f ? near : far;
    x.values = (ratio < 0 ? -tanh : tanh) * limit;
    store<lanes>(x, logits + column);
    store<lanes>({4.0f * decay.values * inverse * inverse}, slopes + column);
  }
}

/// sum_c w_c (reference - x_c) over a stretch, w = 1 without class weights; a class of weight 0 may be impossible.
template <int lanes>
[[gnu::always_inline]] inline double surprise_of(const float* logits, const float* class_weight, int64_t count,
                                                 float reference) {
  Lanes<lanes> sum = broadcast<lanes>(0.0f), values, weight = broadcast<lanes>(1.0f);
  int64_t column = 0;
  for (; column + lanes <= count; column += lanes) {
    load<lanes>(logits + column, values);
    if (class_weight) load<lanes>(class_weight + column, weight);
    values.values = weight.values <= 0 ? weight.values : weight.values * (reference - values.values);
    sum.values += values.values;
  }
  auto total = static_cast<double>(sum_of_lanes<lanes>(sum));
  for (; column < count; ++column) {
    const float of_class = class_weight ? class_weight[column] : 1.0f;
    if (of_class > 0) total += static_cast<double>(of_class) * static_cast<double>(reference - logits[column]);
  }
  return total;
}

/// sum_c e_c (reference - x_c) of whole vectors, e_c = exp(x_c - reference); an impossible class has no part in it.
template <int lanes>
[[gnu::always_inline]] inline double surprise_of_prediction(const float* logits, const float* exponentials,
                                                            int64_t count, float reference) {
  Lanes<lanes> sum = broadcast<lanes>(0.0f), values, share;
  for (int64_t column = 0; column < count; column += lanes) {
    load<lanes>(logits + column, values);
    load<lanes>(exponentials + column, share);
    sum.values += share.values <= 0 ? share.values : share.values * (reference - values.values);
  }
  return static_cast<double>(sum_of_lanes<lanes>(sum));
}

/// The lowest column that holds `value`, the largest of all.
inline int64_t first_of(const float* logits, int64_t count, float value) {
  int64_t column = 0;
  while (column < count && !(logits[column] >= value)) ++column;
  return column;
}

/// Where the exponentials of a stretch go, which may take whole vectors: the last of a row is often no such place.
template <int lanes>
[[gnu::always_inline]] inline float* room_for_exponentials(const CrossEntropyJob& job, CrossEntropyScratch& scratch,
                                                           void* gradient, int64_t first, int64_t count) {
  if (scratch.exponentials) return scratch.exponentials.get() + first;
  return gradient && count % lanes == 0 && job.element == Element::float32 ? static_cast<float*>(gradient) + first
                                                                           : scratch.results;
}

/// Walks along a row: what it is reduced to, and its exponentials.
template <int lanes>
[[gnu::always_inline]] inline void reduce_row(const CrossEntropyJob& job, int64_t target, const void* logits,
                                              void* gradient, CrossEntropyScratch& scratch, CrossEntropyRow& row) {
  constexpr float minus_infinity = -std::numeric_limits<float>::infinity();
  for (int64_t first = 0; first < job.columns; first += stretch) {
    const int64_t count = std::min(stretch, job.columns - first);
    const int64_t padded = (count + lanes - 1) / lanes * lanes;
    const bool has_target = target >= first && target < first + count;
    const float* x = widened<lanes>(logits, job.element, first, count, scratch.values);
    if (job.element == Element::float32 && (has_target || padded != count || job.softcap > 0)) {
      std::memcpy(scratch.values, x, sizeof(float) * static_cast<size_t>(count));
      x = scratch.values;
    }
    if (x == scratch.values) store<lanes>(broadcast<lanes>(minus_infinity), scratch.values + count);
    if (job.softcap > 0) {
      cap<lanes>(scratch.values, padded, static_cast<float>(job.softcap), scratch.slopes.get() + first);
      store<lanes>(broadcast<lanes>(minus_infinity), scratch.values + count);
    }
    if (has_target) scratch.values[target - first] = minus_infinity;
    const float largest = largest_of<lanes>(x, padded);
    if (job.prediction && largest >= row.maximum) {
      const int64_t column = first + first_of(x, count, largest);
      if (largest > row.maximum || column < row.prediction) row.prediction = column;
    }
    if (largest > row.maximum) row.raise_maximum(largest);
    scratch.references[static_cast<size_t>(first / stretch)] = row.reference;
    if (job.label_smoothing > 0) {
      if (has_target) scratch.values[target - first] = row.target_logit;
      row.surprise +=
          surprise_of<lanes>(x, job.class_weight ? job.class_weight + first : nullptr, count, row.reference);
      row.weight += job.weight_of_stretch ? job.weight_of_stretch[first / stretch] : static_cast<double>(count);
      if (has_target) scratch.values[target - first] = minus_infinity;
    }
    float* const exponentials = room_for_exponentials<lanes>(job, scratch, gradient, first, count);
    row.others += static_cast<double>(exponentials_of<lanes>(x, padded, row.reference, exponentials));
    if (job.entropy) {
      row.surprise_of_prediction += surprise_of_prediction<lanes>(x, exponentials, padded, row.reference);
    }
  }
  row.target_exponential = static_cast<double>(exponential<lanes>(row.target_logit - row.reference));
}

/// gradient = (factor e_c - spread w_c) slope_c of one stretch: with label smoothing, and the slope of a cap.
template <int lanes>
[[gnu::always_inline]] inline void smoothed_products(const float* exponentials, int64_t count, float factor,
                                                     float spread, const float* class_weight, const float* slopes,
                                                     float* products) {
  Lanes<lanes> values, weight = broadcast<lanes>(1.0f), slope = broadcast<lanes>(1.0f);
  int64_t column = 0;
  for (; column + lanes <= count; column += lanes) {
    load<lanes>(exponentials + column, values);
    if (class_weight) load<lanes>(class_weight + column, weight);
    if (slopes) load<lanes>(slopes + column, slope);
    values.values = (values.values * factor - weight.values * spread) * slope.values;
    store<lanes>(values, products + column);
  }
  for (; column < count; ++column) {
    const float of_class = class_weight ? class_weight[column] : 1.0f;
    products[column] = (exponentials[column] * factor - of_class * spread) * (slopes ? slopes[column] : 1.0f);
  }
}

/// The gradient of a row from its exponentials: in general a p_j - spread w_j, less the target's coefficient there.
template <int lanes>
[[gnu::always_inline]] inline void write_gradient(const CrossEntropyJob& job, int64_t index, double weight,
                                                  const CrossEntropyRow& row, CrossEntropyScratch& scratch,
                                                  void* gradient) {
  double log_sum_exp = 0;
  if (job.z_loss > 0) {
    Lanes<4> log_sum = broadcast<4>(argument_of_log_sum(row));
    logarithm_of_one_plus<4>(log_sum);
    log_sum_exp = static_cast<double>(row.maximum) + static_cast<double>(log_sum.values[0]);
  }
  const int64_t target = job.weights.targets[index];
  const double target_weight = job.class_weight_of(index);
  const double upstream = weight * (job.upstream ? static_cast<double>(job.upstream[index]) : 1.0);
  const double of_likelihood = upstream * job.likelihood_scale * (1 - job.label_smoothing) * target_weight;
  const double spread = upstream * job.likelihood_scale * job.label_smoothing / static_cast<double>(job.columns);
  const double beside = spread * job.class_weight_sum + 2 * upstream * job.z_scale * job.z_loss * log_sum_exp;
  const double sum = row.others + row.target_exponential;
  const float factor = static_cast<float>(without_payload((of_likelihood + beside) / sum));
  const bool has_slopes = job.softcap > 0, is_smoothed = has_slopes || job.label_smoothing > 0;
  for (int64_t first = 0; first < job.columns; first += stretch) {
    const int64_t count = std::min(stretch, job.columns - first);
    const float* exponentials = room_for_exponentials<lanes>(job, scratch, gradient, first, count);
    const float reference = scratch.references[static_cast<size_t>(first / stretch)];
    float of_stretch = factor;
    if (reference < row.reference) of_stretch *= exponential<lanes>(reference - row.reference);
    if (is_smoothed) {
      smoothed_products<lanes>(exponentials, count, of_stretch, static_cast<float>(without_payload(spread)),
                               job.class_weight ? job.class_weight + first : nullptr,
                               has_slopes ? scratch.slopes.get() + first : nullptr, scratch.values);
      exponentials = scratch.values;
      of_stretch = 1;
    }
    store_products<lanes>(exponentials, count, of_stretch, gradient, job.element, first);
  }
  // (of_likelihood + beside) p_y - of_likelihood - spread w_y, without the cancellation of a confident model
  double of_target =
      -of_likelihood * (row.others / sum) + beside * (row.target_exponential / sum) - spread * target_weight;
  if (has_slopes) of_target *= static_cast<double>(scratch.slopes[static_cast<size_t>(target)]);
  store_number(static_cast<float>(of_target), gradient, job.element, target);
}

/// One row that counts.
template <int lanes>
[[gnu::always_inline]] inline CrossEntropyRow process_row(const CrossEntropyJob& job, int64_t index, double weight,
                                                          CrossEntropyScratch& scratch) {
  const int64_t target = job.weights.targets[index];
  void* const gradient = job.gradient_of(index);
  const void* const logits = job.logits_of(index);
  float target_logit = load_number(logits, job.element, target);
  if (job.softcap > 0) {
    target_logit = static_cast<float>(job.softcap * std::tanh(static_cast<double>(target_logit) / job.softcap));
  }
  CrossEntropyRow row(target_logit, target);
  reduce_row<lanes>(job, target, logits, gradient, scratch, row);
  if (gradient) write_gradient<lanes>(job, index, weight, row, scratch, gradient);
  return row;
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
