/// Cross entropy of rows of few classes, as character and byte models or two-class pixels have them: a vector holds one
/// class of as many rows, and no row costs a horizontal sum or a tail. Without label smoothing, z-loss and softcap alone;
/// with those a row takes the way of `cross_entropy_row.hpp`. What is asked for beside the loss has no say: the same loss
/// has the same bits with it and without.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/cross_entropy_job.hpp"
#include "free_transformer/detail/kernels/vector/elements.hpp"
#include "free_transformer/detail/kernels/vector/exponential.hpp"
#include "free_transformer/detail/kernels/vector/lanes.hpp"
#include "free_transformer/detail/kernels/vector/logarithm.hpp"
#include "free_transformer/detail/numbers.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

inline bool takes_narrow_rows(const CrossEntropyJob& job) {
  return job.columns <= most_narrow_columns && !(job.label_smoothing > 0 || job.softcap > 0 || job.z_loss > 0);
}

/// The lowest column whose logit is the largest of its row, targets left out; `count` if only the target's is.
template <int lanes>
[[gnu::always_inline]] inline void predict(const float* columns, int64_t count, const Lanes<lanes>& maximum,
                                           int32_t* predictions) {
  typename Lanes<lanes>::Integers lowest = typename Lanes<lanes>::Integers{} + static_cast<int32_t>(count);
  for (auto column = static_cast<int32_t>(count); column-- > 0;) {
    Lanes<lanes> values;
    load<lanes>(columns + column * lanes, values);
    const typename Lanes<lanes>::Integers is_largest = values.values >= maximum.values;
    lowest = (is_largest & column) | (~is_largest & lowest);
  }
  std::memcpy(predictions, &lowest, sizeof(lowest));
}

/// One column of as many rows.
template <int lanes, int... lane>
[[gnu::always_inline]] inline void load_column(const float* const* rows, int64_t column, Lanes<lanes>& values,
                                               std::integer_sequence<int, lane...>) {
  values.values = typename Lanes<lanes>::Values{rows[lane][column]...};
}

/// The logits of at most `lanes` rows, turned into columns, and what the rows are reduced to, a row a lane. A row that
/// does not count is one of zeros, of weight 0.
template <int lanes>
struct NarrowRows {
  Lanes<lanes> weight, class_weight, maximum, target_logit, target_exponential;
  Lanes<lanes> others;     ///< sum of exp(x_j - reference) over all classes but the target
  Lanes<lanes> surprises;  ///< sum of exp(x_j - reference) (reference - x_j) over them, if the entropy is asked for
  Lanes<lanes> log_sum, nll, likelihood_loss;
  alignas(64) int32_t targets[size_t{lanes}], predictions[size_t{lanes}];
};

/// Reads the rows and leaves their exponentials in `columns`.
template <int lanes>
[[gnu::always_inline]] inline void reduce_narrow_rows(const CrossEntropyJob& job, int64_t begin, int64_t count,
                                                      CrossEntropyScratch& scratch, NarrowRows<lanes>& rows) {
  static constexpr float zeros[size_t{most_narrow_columns}] = {};
  alignas(64) float weights[size_t{lanes}] = {}, class_weights[size_t{lanes}] = {}, target_logits[size_t{lanes}] = {};
  const float* logits[size_t{lanes}];
  float* const columns = scratch.columns;
  const float* adjacent = nullptr;
  if (job.logit_rows->are_adjacent(job.columns)) {
    adjacent = widened(job.logits_of(begin), job.element, 0, count * job.columns, scratch.rows);
  }
  for (int64_t lane = 0; lane < lanes; ++lane) {
    logits[lane] = zeros;
    rows.targets[lane] = -1;
    const double weight = lane < count ? job.weights(begin + lane) : 0;
    if (!(weight > 0)) continue;
    const int64_t offset = lane * job.columns;
    logits[lane] = adjacent ? adjacent + offset
                            : widened(job.logits_of(begin + lane), job.element, 0, job.columns, scratch.rows + offset);
    rows.targets[lane] = static_cast<int32_t>(job.weights.targets[begin + lane]);
    target_logits[lane] = logits[lane][rows.targets[lane]];
    weights[lane] = static_cast<float>(weight);
    class_weights[lane] = static_cast<float>(job.class_weight_of(begin + lane));
  }
  load<lanes>(weights, rows.weight);
  load<lanes>(class_weights, rows.class_weight);
  load<lanes>(target_logits, rows.target_logit);

  typename Lanes<lanes>::Integers targets;
  std::memcpy(&targets, rows.targets, sizeof(targets));
  const Lanes<lanes> zero = broadcast<lanes>(0.0f),
                     impossible = broadcast<lanes>(-std::numeric_limits<float>::infinity());
  Lanes<lanes> values = zero, maximum = rows.target_logit, others = zero, surprises = zero;
  for (int64_t column = 0; column < job.columns; ++column) {
    load_column<lanes>(logits, column, values, std::make_integer_sequence<int, lanes>{});
    values.values = targets == static_cast<int32_t>(column) ? impossible.values : values.values;
    store<lanes>(values, columns + column * lanes);
    take_larger<lanes>(maximum, values);
  }
  if (job.prediction) predict<lanes>(columns, job.columns, maximum, rows.predictions);
  const Lanes<lanes> reference{maximum.values < -std::numeric_limits<float>::max() ? zero.values : maximum.values};
  for (int64_t column = 0; column < job.columns; ++column) {
    load<lanes>(columns + column * lanes, values);
    values.values -= reference.values;
    const Lanes<lanes> surprise{-values.values};
    exponentiate<lanes>(values);
    store<lanes>(values, columns + column * lanes);
    others.values += values.values;
    if (job.entropy) surprises.values += values.values <= 0 ? values.values : values.values * surprise.values;
  }
  rows.maximum = maximum;
  rows.others = others;
  rows.surprises = surprises;
  rows.target_exponential.values = rows.target_logit.values - reference.values;
  exponentiate<lanes>(rows.target_exponential);
}

/// The losses: see `finish_row`.
template <int lanes>
[[gnu::always_inline]] inline void finish_narrow_rows(const CrossEntropyJob& job, int64_t begin, int64_t count,
                                                      NarrowRows<lanes>& rows, CrossEntropySums& sums) {
  const auto &others = rows.others.values, &target_exponential = rows.target_exponential.values;
  rows.log_sum.values = rows.target_logit.values >= rows.maximum.values ? others : others - 1.0f + target_exponential;
  logarithm_of_one_plus<lanes>(rows.log_sum);
  const Lanes<lanes> below{rows.maximum.values - rows.target_logit.values};
  rows.nll.values = rows.log_sum.values + below.values;
  const Lanes<lanes> weighted{rows.class_weight.values * rows.nll.values};
  rows.likelihood_loss.values = rows.class_weight.values > 0.0f ? weighted.values : rows.class_weight.values;
  sums.nll += static_cast<double>(sum_of_lanes<lanes>({rows.weight.values * rows.nll.values}));
  sums.likelihood_loss += static_cast<double>(sum_of_lanes<lanes>({rows.weight.values * rows.likelihood_loss.values}));
  if (!job.nll && !job.prediction && !job.entropy) return;

  const Lanes<lanes> log_sum_exp{rows.maximum.values + rows.log_sum.values};
  const Lanes<lanes> of_target{target_exponential <= 0.0f ? target_exponential : target_exponential * below.values};
  const Lanes<lanes> entropy{rows.log_sum.values +
                             (rows.surprises.values + of_target.values) / (others + target_exponential)};
  for (int64_t lane = 0; lane < count; ++lane) {
    const int64_t index = begin + lane;
    const bool counts = rows.weight.values[lane] > 0, is_possible = !is_nan(static_cast<double>(rows.nll.values[lane]));
    if (job.nll) {
      job.nll[index] = counts ? rows.nll.values[lane] : 0;
      job.likelihood_loss[index] = counts ? rows.likelihood_loss.values[lane] : 0;
      job.log_sum_exp[index] = !counts ? 0 : is_possible ? log_sum_exp.values[lane] : rows.nll.values[lane];
    }
    if (job.entropy) job.entropy[index] = counts ? entropy.values[lane] : 0;
    if (!job.prediction) continue;
    const int64_t target = rows.targets[lane], other = rows.predictions[lane];
    int64_t prediction = rows.target_logit.values[lane] >= rows.maximum.values[lane] ? std::min(target, other) : other;
    if (prediction == job.columns) prediction = target;  // of NaN
    job.prediction[index] = counts ? prediction : 0;
    if (counts && is_possible && prediction == target) sums.hits += static_cast<double>(rows.weight.values[lane]);
  }
}

/// The gradient from the exponentials in `columns`, row by row.
template <int lanes>
[[gnu::always_inline]] inline void write_narrow_gradient(const CrossEntropyJob& job, int64_t begin, int64_t count,
                                                         CrossEntropyScratch& scratch, const NarrowRows<lanes>& rows) {
  float* const columns = scratch.columns;
  alignas(64) float scales[size_t{lanes}] = {}, target_gradients[size_t{lanes}];
  for (int64_t lane = 0; lane < count; ++lane) {
    const double upstream = job.upstream ? static_cast<double>(job.upstream[begin + lane]) : 1.0;
    scales[lane] = static_cast<float>(without_payload(upstream * job.likelihood_scale));
  }
  Lanes<lanes> values, factor;
  load<lanes>(scales, factor);
  factor.values *= rows.weight.values * rows.class_weight.values;
  factor.values /= rows.others.values + rows.target_exponential.values;
  store<lanes>({-factor.values * rows.others.values}, target_gradients);
  for (int64_t column = 0; column < job.columns; ++column) {
    load<lanes>(columns + column * lanes, values);
    values.values *= factor.values;
    store<lanes>(values, columns + column * lanes);
  }
  const bool is_float = job.element == Element::float32, are_adjacent = job.gradient_rows->are_adjacent(job.columns);
  for (int64_t lane = 0; lane < count; ++lane) {
    void* const gradient = job.gradient_of(begin + lane);
    float* const row = is_float ? static_cast<float*>(gradient) : scratch.rows + lane * job.columns;
    if (rows.targets[lane] < 0 || !(rows.class_weight.values[lane] > 0)) {  // whatever the logits are
      std::memset(row, 0, sizeof(float) * static_cast<size_t>(job.columns));
    } else {
      for (int64_t column = 0; column < job.columns; ++column) row[column] = columns[column * lanes + lane];
      row[rows.targets[lane]] = target_gradients[lane];
    }
    if (!is_float && !are_adjacent) store_products(row, job.columns, 1.0f, gradient, job.element, 0);
  }
  if (!is_float && are_adjacent) {
    store_products(scratch.rows, count * job.columns, 1.0f, job.gradient_of(begin), job.element, 0);
  }
}

/// Rows [begin, end), as many at a time as a vector has lanes.
struct ProcessNarrowRows {
  const CrossEntropyJob& shared_job;
  int64_t begin, end;
  CrossEntropyScratch& scratch;

  template <int lanes>
  [[gnu::always_inline]] CrossEntropySums run() const {
    const CrossEntropyJob job = shared_job;  // which no store through a pointer can change, as the compiler sees
    CrossEntropySums sums;
    for (int64_t first = begin; first < end; first += lanes) {
      const int64_t count = std::min<int64_t>(end - first, lanes);
      NarrowRows<lanes> rows;
      reduce_narrow_rows<lanes>(job, first, count, scratch, rows);
      finish_narrow_rows<lanes>(job, first, count, rows, sums);
      if (job.gradient) write_narrow_gradient<lanes>(job, first, count, scratch, rows);
    }
    return sums;
  }
};

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
