/// Cross entropy of a range of rows: each is reduced in the way that its width asks for, the
/// logarithms of a group of wide rows are taken in vectors, and what the caller wants of the rows is written and summed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/cross_entropy_job.hpp"
#include "free_transformer/detail/kernels/cross_entropy_narrow_rows.hpp"
#include "free_transformer/detail/kernels/cross_entropy_row.hpp"
#include "free_transformer/detail/kernels/cross_entropy_stretch.hpp"
#include "free_transformer/detail/kernels/vector/instruction_set.hpp"
#include "free_transformer/detail/numbers.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

/// Nothing of a row that does not count.
inline void leave_out_row(const CrossEntropyJob& job, int64_t index) {
  if (job.nll) job.nll[index] = job.likelihood_loss[index] = job.log_sum_exp[index] = 0;
  if (job.entropy) job.entropy[index] = 0;
  if (job.prediction) job.prediction[index] = 0;
}

/// The losses of a row that counts.
inline void finish_row(const CrossEntropyJob& job, int64_t index, double weight, const CrossEntropyRow& row,
                       double log_sum, CrossEntropySums& sums) {
  const double nll = log_sum + static_cast<double>(row.maximum - row.target_logit);
  const double target_share = (1 - job.label_smoothing) * job.class_weight_of(index);
  double likelihood_loss = !(target_share > 0) ? 0 : target_share * nll;
  const bool has_no_softmax = is_nan(nll);  // of no possible class, say: its sums are relative to no logit of it
  if (job.label_smoothing > 0 && job.class_weight_sum > 0) {
    const double surprise = has_no_softmax ? nll : job.class_weight_sum * log_sum + row.surprise;
    likelihood_loss += job.label_smoothing / static_cast<double>(job.columns) * surprise;
  }
  const double log_sum_exp = has_no_softmax ? nll : static_cast<double>(row.maximum) + log_sum;
  sums.likelihood_loss += weight * likelihood_loss;
  sums.z_loss += weight * log_sum_exp * log_sum_exp;
  sums.nll += weight * nll;
  if (job.nll) {
    job.nll[index] = static_cast<float>(nll);
    job.likelihood_loss[index] = static_cast<float>(likelihood_loss);
    job.log_sum_exp[index] = static_cast<float>(log_sum_exp);
  }
  if (job.prediction) {
    job.prediction[index] = row.prediction;
    if (row.prediction == job.weights.targets[index] && !is_nan(nll)) sums.hits += weight;
  }
  if (job.entropy) {  // -sum_c p_c log p_c with -log p_c = log_sum + maximum - x_c: no term is negative, none cancels
    double of_target = row.target_exponential * static_cast<double>(row.maximum - row.target_logit);
    if (row.target_exponential <= 0) of_target = 0;
    const double sum = row.others + row.target_exponential;
    job.entropy[index] = static_cast<float>(log_sum + (row.surprise_of_prediction + of_target) / sum);
  }
}

/// At most `rows_of_group` rows.
inline void process_group(const CrossEntropyJob& job, int64_t begin, int64_t end, CrossEntropyScratch& scratch,
                          CrossEntropySums& sums) {
  double weights[size_t{rows_of_group}] = {};
  CrossEntropyRow rows[size_t{rows_of_group}];
  alignas(64) float log_sums[size_t{rows_of_group}] = {};
  for (int64_t index = begin; index < end; ++index) {
    const double weight = weights[index - begin] = job.weights(index);
    CrossEntropyRow& row = rows[index - begin];
    if (weight > 0) {
      row = process_row(job, index, weight, scratch);
    } else if (job.gradient) {
      std::memset(job.gradient_of(index), 0, static_cast<size_t>(job.columns * bytes_of(job.element)));
    }
    log_sums[index - begin] = argument_of_log_sum(row);
  }
  run_vectorized(LogarithmsOfOnePlus{log_sums, rows_of_group});
  for (int64_t row = 0; row < end - begin; ++row) {
    if (weights[row] > 0) {
      finish_row(job, begin + row, weights[row], rows[row], static_cast<double>(log_sums[row]), sums);
    } else {
      leave_out_row(job, begin + row);
    }
  }
}

/// Rows [begin, end).
inline CrossEntropySums process_block(const CrossEntropyJob& job, int64_t begin, int64_t end,
                                      CrossEntropyScratch& scratch) {
  CrossEntropySums sums;
  if (takes_narrow_rows(job)) return run_vectorized(ProcessNarrowRows{job, begin, end, scratch});
  for (int64_t first = begin; first < end; first += rows_of_group) {
    process_group(job, first, std::min(end, first + rows_of_group), scratch, sums);
  }
  return sums;
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
