/// The device kernels of what all rows of a cross entropy have in common, as a text for NVRTC: the scales that follow
/// from targets and weights alone, before the rows; and the sums, after them.
///
/// Each reads some numbers a row, a thread every so many rows, and its last block adds up what the others have left.
/// The grid, and so the order of a sum, follows from the number of rows alone.
#pragma once

#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::device {

/// Goes behind `arithmetic_source`, whose ELEMENT has no say here. The struct is that of `jobs.hpp`.
inline constexpr char cross_entropy_sums_source[] = R"(
// What is asked of all rows together.
struct CrossEntropyBatchJob {
  const long long* targets;
  long long ignore_index;
  const float* token_weight;
  const float* class_weight;
  long long rows, columns;
  Divisor divisor;
  double z_loss;
  const float* nll;
  const float* likelihood_loss;
  const float* log_sum_exp;
  const long long* prediction;
  double* scales;  // of the likelihood, of the z-loss, then the sums of u w_y and of u
  double* sums;
  float* loss;
  unsigned* ticket;
  double* partial;
};

FUNCTION double class_weight_of_row(const CrossEntropyBatchJob& job, long long target) {
  const bool has_weight = job.class_weight && target >= 0 && target < job.columns;
  return has_weight ? static_cast<double>(job.class_weight[target]) : 1.0;
}

KERNEL void __launch_bounds__(256, 4) cross_entropy_scales(const CrossEntropyBatchJob job) {
  double weights[2] = {0.0, 0.0};
  const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
  for (long long row = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; row < job.rows; row += stride) {
    const long long target = job.targets[row];
    const float weight = weight_of_row(target, job.ignore_index, job.token_weight, row, job.columns);
    if (weight == 0.0f) continue;
    weights[0] += static_cast<double>(weight) * class_weight_of_row(job, target);
    weights[1] += static_cast<double>(weight);
  }
  if (!sum_over_launch(weights, job.partial, job.ticket, job.scales + 2) || threadIdx.x != 0) return;
  const double likelihood_weight = job.scales[2], token_weight = job.scales[3];
  job.scales[0] = loss_scale(job.divisor, likelihood_weight, token_weight);
  job.scales[1] = loss_scale(job.divisor, token_weight, token_weight);
}

KERNEL void __launch_bounds__(256, 4) cross_entropy_sums(const CrossEntropyBatchJob job) {
  double of[6] = {0.0, 0.0, 0.0, 0.0, 0.0, 0.0};  // in the order of ReconstructionSum
  const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
  for (long long row = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; row < job.rows; row += stride) {
    const long long target = job.targets[row];
    const float float_weight = weight_of_row(target, job.ignore_index, job.token_weight, row, job.columns);
    if (float_weight == 0.0f) continue;
    const double weight = static_cast<double>(float_weight);
    of[0] += weight * static_cast<double>(job.likelihood_loss[row]);
    of[1] += weight * class_weight_of_row(job, target);
    const double log_sum_exp = static_cast<double>(job.log_sum_exp[row]);
    if (job.z_loss > 0.0) of[2] += weight * (job.z_loss * log_sum_exp * log_sum_exp);
    of[3] += weight;
    of[4] += weight * static_cast<double>(job.nll[row]);
    const bool is_hit = job.prediction && job.prediction[row] == target && job.nll[row] == job.nll[row];  // no NaN
    if (is_hit) of[5] += weight;
  }
  if (!sum_over_launch(of, job.partial, job.ticket, job.sums) || threadIdx.x != 0 || !job.loss) return;
  *job.loss = static_cast<float>(job.sums[0] * job.scales[0] + job.sums[2] * job.scales[1]);
}
)";

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::device
