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

/// Rows [begin, end), at most `lanes` of them. A row that does not count is computed as one of zeros and left out after.
template <int lanes>
[[gnu::always_inline]] inline void process_narrow_rows(const CrossEntropyJob& job, int64_t begin, int64_t end,
                                                       const double* weights, CrossEntropyScratch& scratch,
                                                       CrossEntropyRow* rows) {
  constexpr float minus_infinity = -std::numeric_limits<float>::infinity();
  static constexpr float zeros[size_t{most_narrow_columns}] = {};
  float* const columns = scratch.columns;
  alignas(64) float target_logits[size_t{lanes}] = {}, factors[size_t{lanes}] = {}, parts[4][size_t{lanes}];
  alignas(64) int32_t predictions[size_t{lanes}] = {}, target_columns[size_t{lanes}];
  const float* logits[size_t{lanes}];
  const int count = static_cast<int>(end - begin);
  for (int lane = 0; lane < lanes; ++lane) {
    logits[lane] = zeros;
    target_columns[lane] = -1;
    if (lane >= count || !(weights[lane] > 0)) continue;
    float* const room = scratch.rows + lane * (most_narrow_columns + most_lanes);
    logits[lane] = widened<lanes>(job.logits_of(begin + lane), job.element, 0, job.columns, room);
    target_columns[lane] = static_cast<int32_t>(job.weights.targets[begin + lane]);
    target_logits[lane] = logits[lane][target_columns[lane]];
  }

  Lanes<lanes> values = broadcast<lanes>(0.0f), target_logit = values, others = values, surprises = values;
  typename Lanes<lanes>::Integers targets;
  std::memcpy(&targets, target_columns, sizeof(targets));
  load<lanes>(target_logits, target_logit);
  Lanes<lanes> maximum = target_logit;
  const Lanes<lanes> zero = broadcast<lanes>(0.0f), impossible = broadcast<lanes>(minus_infinity);
  for (int64_t column = 0; column < job.columns; ++column) {
    load_column<lanes>(logits, column, values, std::make_integer_sequence<int, lanes>{});
    values.values = targets == static_cast<int32_t>(column) ? impossible.values : values.values;
    store<lanes>(values, columns + column * lanes);
    take_larger<lanes>(maximum, values);
  }
  const Lanes<lanes> reference{maximum.values < -std::numeric_limits<float>::max() ? zero.values : maximum.values};
  if (job.prediction) predict<lanes>(columns, job.columns, maximum, predictions);
  for (int64_t column = 0; column < job.columns; ++column) {
    load<lanes>(columns + column * lanes, values);
    values.values -= reference.values;
    const Lanes<lanes> surprise{-values.values};
    exponentiate<lanes>(values);
    store<lanes>(values, columns + column * lanes);
    others.values += values.values;
    if (job.entropy) surprises.values += values.values <= 0 ? values.values : values.values * surprise.values;
  }
  Lanes<lanes> target_exponential{target_logit.values - reference.values};
  exponentiate<lanes>(target_exponential);
  store<lanes>(maximum, parts[0]);
  store<lanes>(others, parts[1]);
  store<lanes>(target_exponential, parts[2]);
  store<lanes>(surprises, parts[3]);
  for (int lane = 0; lane < count; ++lane) {
    rows[lane].target_logit = target_logits[lane];
    rows[lane].maximum = parts[0][lane];
    rows[lane].others = static_cast<double>(parts[1][lane]);
    rows[lane].target_exponential = static_cast<double>(parts[2][lane]);
    rows[lane].surprise_of_prediction = static_cast<double>(parts[3][lane]);
    if (job.prediction && weights[lane] > 0) {
      const int64_t target = job.weights.targets[begin + lane], other = predictions[lane];
      rows[lane].prediction = target_logits[lane] >= parts[0][lane] ? std::min(target, other) : other;
      if (rows[lane].prediction == job.columns) rows[lane].prediction = target;  // of NaN
    }
  }
  if (!job.gradient) return;

  for (int lane = 0; lane < count; ++lane) {
    const double upstream = weights[lane] * (job.upstream ? static_cast<double>(job.upstream[begin + lane]) : 1.0);
    const double scale = weights[lane] > 0 ? upstream * job.likelihood_scale * job.class_weight_of(begin + lane) : 0;
    const double sum = rows[lane].others + rows[lane].target_exponential;
    factors[lane] = static_cast<float>(without_payload(scale / sum));
    target_logits[lane] = static_cast<float>(without_payload(-scale * (rows[lane].others / sum)));
  }
  Lanes<lanes> factor;
  load<lanes>(factors, factor);
  for (int64_t column = 0; column < job.columns; ++column) {
    load<lanes>(columns + column * lanes, values);
    values.values *= factor.values;
    store<lanes>(values, columns + column * lanes);
  }
  for (int lane = 0; lane < count; ++lane) {
    void* const gradient = job.gradient_of(begin + lane);
    if (!(weights[lane] > 0)) {
      std::memset(gradient, 0, static_cast<size_t>(job.columns * bytes_of(job.element)));
      continue;
    }
    const bool is_written_at_once = job.element == Element::float32;
    float* const row = is_written_at_once ? static_cast<float*>(gradient) : scratch.rows;
    for (int64_t column = 0; column < job.columns; ++column) row[column] = columns[column * lanes + lane];
    row[target_columns[lane]] = target_logits[lane];
    if (!is_written_at_once) store_products<lanes>(row, job.columns, 1.0f, gradient, job.element, 0);
  }
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
