/// Cross entropy of one row of logits and its gradient.
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
#include "free_transformer/detail/kernels/cross_entropy_stretch.hpp"
#include "free_transformer/detail/kernels/vector/elements.hpp"
#include "free_transformer/detail/kernels/vector/instruction_set.hpp"
#include "free_transformer/detail/numbers.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

/// The lowest column that holds `value`, the largest of all.
inline int64_t first_of(const float* logits, int64_t count, float value) {
  int64_t column = 0;
  while (column < count && !(logits[column] >= value)) ++column;
  return column;
}

/// Where the exponentials of a stretch go, which may take whole vectors: the last of a row is often no such place.
inline float* room_for_exponentials(const CrossEntropyJob& job, CrossEntropyScratch& scratch, void* gradient,
                                    int64_t first, int64_t count) {
  if (scratch.exponentials) return scratch.exponentials.get() + first;
  const bool is_room = gradient && count % scratch.lanes == 0 && job.element == Element::float32;
  return is_room ? static_cast<float*>(gradient) + first : scratch.results;
}

/// Walks along a row: what it is reduced to, and its exponentials.
inline void reduce_row(const CrossEntropyJob& job, int64_t target, const void* logits, void* gradient,
                       CrossEntropyScratch& scratch, CrossEntropyRow& row) {
  constexpr float minus_infinity = -std::numeric_limits<float>::infinity();
  const bool is_copied = job.softcap > 0 || job.label_smoothing > 0 || job.prediction || job.entropy;
  for (int64_t first = 0; first < job.columns; first += stretch) {
    const int64_t count = std::min(stretch, job.columns - first);
    const int64_t padded = (count + scratch.lanes - 1) / scratch.lanes * scratch.lanes;
    const bool has_target = target >= first && target < first + count;
    const float* x = widened(logits, job.element, first, count, scratch.values);
    if (job.element == Element::float32 && (padded != count || is_copied)) {
      std::memcpy(scratch.values, x, sizeof(float) * static_cast<size_t>(count));
      x = scratch.values;
    }
    if (job.softcap > 0) {
      run_vectorized(Cap{scratch.values, padded, static_cast<float>(job.softcap), scratch.slopes.get() + first});
    }
    if (x == scratch.values) std::fill(scratch.values + count, scratch.values + padded, minus_infinity);
    float* const exponentials = room_for_exponentials(job, scratch, gradient, first, count);
    const auto [largest, sum, of_target] =
        run_vectorized(ExponentialsOfStretch{x, padded, has_target ? target - first : -1, row.maximum, exponentials});
    if (job.prediction && largest >= row.maximum) {
      const int64_t column = first + first_of(x, count, largest);
      if (largest > row.maximum || column < row.prediction) row.prediction = column;
    }
    if (largest > row.maximum) row.raise_maximum(largest);
    row.others += static_cast<double>(sum);
    if (has_target) row.target_exponential = static_cast<double>(of_target);
    scratch.references[static_cast<size_t>(first / stretch)] = row.reference;
    if (job.entropy) {
      row.surprise_of_prediction += run_vectorized(SurpriseOfPrediction{x, exponentials, padded, row.reference});
    }
    if (job.label_smoothing > 0) {
      const float* const class_weight = job.class_weight ? job.class_weight + first : nullptr;
      row.surprise += run_vectorized(SurpriseOf{x, class_weight, count, row.reference});
      row.weight += job.weight_of_stretch ? job.weight_of_stretch[first / stretch] : static_cast<double>(count);
    }
  }
}

/// The gradient of a row from its exponentials: in general a p_j - spread w_j, less the target's coefficient there.
inline void write_gradient(const CrossEntropyJob& job, int64_t index, double weight, const CrossEntropyRow& row,
                           CrossEntropyScratch& scratch, void* gradient) {
  double log_sum_exp = 0;
  if (job.z_loss > 0) {
    log_sum_exp = static_cast<double>(row.maximum) + std::log1p(static_cast<double>(argument_of_log_sum(row)));
  }
  const int64_t target = job.weights.targets[index];
  const double target_weight = job.class_weight_of(index);
  const double upstream = weight * (job.upstream ? static_cast<double>(job.upstream[index]) : 1.0);
  if (!(target_weight > 0 || job.label_smoothing > 0 || job.z_loss > 0)) {  // whatever the logits are
    std::memset(gradient, 0, static_cast<size_t>(job.columns * bytes_of(job.element)));
    return;
  }
  const double of_likelihood = upstream * job.likelihood_scale * (1 - job.label_smoothing) * target_weight;
  const double spread = upstream * job.likelihood_scale * job.label_smoothing / static_cast<double>(job.columns);
  const double beside = spread * job.class_weight_sum + 2 * upstream * job.z_scale * job.z_loss * log_sum_exp;
  const double sum = row.others + row.target_exponential;
  const auto factor = static_cast<float>(without_payload((of_likelihood + beside) / sum));
  const bool has_slopes = job.softcap > 0, is_smoothed = has_slopes || job.label_smoothing > 0;
  for (int64_t first = 0; first < job.columns; first += stretch) {
    const int64_t count = std::min(stretch, job.columns - first);
    const float* exponentials = room_for_exponentials(job, scratch, gradient, first, count);
    const float reference = scratch.references[static_cast<size_t>(first / stretch)];
    float of_stretch = factor;
    if (reference < row.reference) of_stretch *= std::exp(reference - row.reference);
    if (is_smoothed) {
      run_vectorized(SmoothedProducts{exponentials, count, of_stretch, static_cast<float>(without_payload(spread)),
                                      job.class_weight ? job.class_weight + first : nullptr,
                                      has_slopes ? scratch.slopes.get() + first : nullptr, scratch.values});
      exponentials = scratch.values;
      of_stretch = 1;
    }
    store_products(exponentials, count, of_stretch, gradient, job.element, first);
  }
  // (of_likelihood + beside) p_y - of_likelihood - spread w_y, without the cancellation of a confident model
  double of_target =
      -of_likelihood * (row.others / sum) + beside * (row.target_exponential / sum) - spread * target_weight;
  if (has_slopes) of_target *= static_cast<double>(scratch.slopes[static_cast<size_t>(target)]);
  store_number(static_cast<float>(of_target), gradient, job.element, target);
}

/// One row that counts.
inline CrossEntropyRow process_row(const CrossEntropyJob& job, int64_t index, double weight,
                                   CrossEntropyScratch& scratch) {
  const int64_t target = job.weights.targets[index];
  void* const gradient = job.gradient_of(index);
  const void* const logits = job.logits_of(index);
  float target_logit = load_number(logits, job.element, target);
  if (job.softcap > 0) {  // by the arithmetic of the others: equal logits stay equal
    std::fill_n(scratch.results, scratch.lanes, target_logit);
    run_vectorized(Cap{scratch.results, scratch.lanes, static_cast<float>(job.softcap), scratch.slopes.get()});
    target_logit = scratch.results[0];
  }
  CrossEntropyRow row(target_logit, target);
  reduce_row(job, target, logits, gradient, scratch, row);
  if (gradient) write_gradient(job, index, weight, row, scratch, gradient);
  return row;
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
