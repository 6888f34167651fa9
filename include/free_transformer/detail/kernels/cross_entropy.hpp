/// Cross entropy of float32, float16 and bfloat16 logits on the CPU by vector kernels, from tensors to tensors.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/pairwise_sum.hpp"
#include "free_transformer/detail/kernels/row_offsets.hpp"
#include "free_transformer/detail/kernels/vector/parallel_rows.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/positions.hpp"
#include "free_transformer/detail/settings.hpp"
#if FREE_TRANSFORMER_VECTOR_KERNELS
#include "free_transformer/detail/kernels/cross_entropy_rows.hpp"
#endif

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

/// True if the kernels can take these logits; the others go the way of LibTorch operations.
inline bool takes_cross_entropy(const at::Tensor& logits, const CrossEntropySettings& settings) {
  return FREE_TRANSFORMER_VECTOR_KERNELS && logits.device().is_cpu() && logits.scalar_type() != at::kDouble &&
         !settings.has_probabilities() && !logits.is_neg() && !logits._is_zerotensor() &&
         (logits.stride(-1) == 1 || logits.size(-1) == 1);
}

inline PositionWeights position_weights(const CrossEntropySettings& settings) {
  return {settings.targets.data_ptr<int64_t>(), settings.ignore_index,
          settings.token_weight.defined() ? settings.token_weight.data_ptr<float>() : nullptr};
}

/// On the host, in one look at targets and weights.
inline CrossEntropyPositions cross_entropy_positions(const CrossEntropySettings& settings, int64_t /*classes*/,
                                                     at::ScalarType /*type*/, const Normalization& normalization) {
  const int64_t rows = settings.targets.numel();
  const float* class_weight = settings.class_weight.defined() ? settings.class_weight.data_ptr<float>() : nullptr;
  const PositionWeights weights = position_weights(settings);
  const double counted =
      weights.token_weight
          ? pairwise_sum(0, rows, weights)
          : static_cast<double>(rows - std::count(weights.targets, weights.targets + rows, weights.ignore_index));
  const double weight = !class_weight ? counted : pairwise_sum(0, rows, [&](int64_t row) {
    const double of_token = weights(row);
    return !(of_token > 0) ? 0 : of_token * static_cast<double>(class_weight[weights.targets[row]]);
  });
  CrossEntropyPositions positions;
  positions.scales = at::empty({reconstruction_scale_count}, settings.targets.options().dtype(at::kDouble));
  auto* scales = positions.scales.data_ptr<double>();
  scales[scale_of_likelihood] = loss_scale(normalization, weight, counted);
  scales[scale_of_z] = loss_scale(normalization, counted, counted);
  scales[weight_of_likelihood] = weight;
  scales[weight_of_tokens] = counted;
  return positions;
}

#if FREE_TRANSFORMER_VECTOR_KERNELS
/// The job's rows on LibTorch's threads, in blocks whose sums do not depend on how they are split among those.
inline CrossEntropySums process_rows(const CrossEntropyJob& job, int64_t rows) {
  const int64_t rows_of_block = std::max<int64_t>(1, 32768 / job.columns);
  const int64_t blocks = (rows + rows_of_block - 1) / rows_of_block;
  std::vector<CrossEntropySums> of_blocks(static_cast<size_t>(blocks));
  parallel_rows(blocks, 1, [&](int64_t first_block, int64_t last_block) {
    CrossEntropyScratch scratch(job);
    for (int64_t block = first_block; block < last_block; ++block) {
      of_blocks[static_cast<size_t>(block)] =
          process_block(job, block * rows_of_block, std::min(rows, (block + 1) * rows_of_block), scratch);
    }
  });
  const auto total = [&](double CrossEntropySums::*sum) {
    return pairwise_sum(0, blocks, [&](int64_t block) { return of_blocks[static_cast<size_t>(block)].*sum; });
  };
  return {total(&CrossEntropySums::likelihood_loss), total(&CrossEntropySums::z_loss), total(&CrossEntropySums::nll),
          total(&CrossEntropySums::hits)};
}
#endif

/// All rows, and their gradient if `gradient` is defined (of the logits' shape and type; it may be the logits).
/// upstream is [N] float32 and multiplies the scales, or undefined.
inline CrossEntropyOfRows cross_entropy_rows(const at::Tensor& logits, const CrossEntropySettings& settings,
                                             const CrossEntropyPositions& positions, const at::Tensor& gradient,
                                             const at::Tensor& upstream, const WantedOfRows& wanted) {
  CrossEntropyOfRows result;
#if FREE_TRANSFORMER_VECTOR_KERNELS
  const int64_t rows = settings.targets.numel();
  const auto empty = [&](at::ScalarType type) { return at::empty({rows}, logits.options().dtype(type)); };
  if (wanted.each) result.rows = {empty(at::kFloat), empty(at::kFloat), empty(at::kFloat), {}, {}};
  if (wanted.prediction) result.rows.prediction = empty(at::kLong);
  if (wanted.entropy) result.rows.entropy = empty(at::kFloat);
  const auto numbers = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.data_ptr<float>() : nullptr; };
  const RowOffsets logit_rows(logits), gradient_rows(gradient.defined() ? gradient : logits);
  CrossEntropyJob job{};
  job.logits = logits.data_ptr();
  job.element = element_of(logits.scalar_type());
  job.logit_rows = &logit_rows;
  job.columns = logits.size(-1);
  job.weights = position_weights(settings);
  job.class_weight = numbers(settings.class_weight);
  job.class_weight_sum = static_cast<double>(job.columns);
  std::vector<double> weight_of_stretch;
  if (job.class_weight) {
    const auto weight = [&](int64_t column) { return static_cast<double>(job.class_weight[column]); };
    for (int64_t first = 0; first < job.columns; first += stretch) {
      weight_of_stretch.push_back(pairwise_sum(first, std::min(job.columns, first + stretch), weight));
    }
    job.class_weight_sum = pairwise_sum(0, job.columns, weight);
    job.weight_of_stretch = weight_of_stretch.data();
  }
  job.label_smoothing = settings.label_smoothing;
  job.z_loss = settings.z_loss;
  job.softcap = settings.softcap;
  job.gradient = gradient.defined() ? gradient.data_ptr() : nullptr;
  job.gradient_rows = &gradient_rows;
  const at::Tensor adjacent_upstream = upstream.defined() ? upstream.contiguous() : upstream;
  job.upstream = numbers(adjacent_upstream);
  const double* scales = positions.scales.data_ptr<double>();
  job.likelihood_scale = scales[scale_of_likelihood];
  job.z_scale = scales[scale_of_z];
  job.nll = numbers(result.rows.nll);
  job.likelihood_loss = numbers(result.rows.likelihood_loss);
  job.log_sum_exp = numbers(result.rows.log_sum_exp);
  job.entropy = numbers(result.rows.entropy);
  job.prediction = wanted.prediction ? result.rows.prediction.data_ptr<int64_t>() : nullptr;
  const CrossEntropySums sums = process_rows(job, rows);
  if (!wanted.sums) return result;
  result.sums = at::empty({reconstruction_sum_count}, logits.options().dtype(at::kDouble));
  auto* of = result.sums.data_ptr<double>();
  of[likelihood_loss_sum] = sums.likelihood_loss;
  of[likelihood_weight_sum] = scales[weight_of_likelihood];
  of[z_loss_sum] = settings.z_loss > 0 ? settings.z_loss * sums.z_loss : 0;
  of[token_weight_sum] = scales[weight_of_tokens];
  of[nll_sum] = sums.nll;
  of[hit_sum] = sums.hits;
#else
  TORCH_INTERNAL_ASSERT(false, logits, settings.targets, positions.scales, gradient, upstream, wanted.entropy);
#endif
  return result;
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
