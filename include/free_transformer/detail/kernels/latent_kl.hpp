/// The free-bits KL of float32, float16 and bfloat16 logits on the CPU by vector kernels, from tensors to tensors.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/hinge.hpp"
#include "free_transformer/detail/kernels/pairwise_sum.hpp"
#include "free_transformer/detail/kernels/row_offsets.hpp"
#include "free_transformer/detail/kernels/vector/large_pages.hpp"
#include "free_transformer/detail/kernels/vector/parallel_rows.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/settings.hpp"
#if FREE_TRANSFORMER_VECTOR_KERNELS
#include "free_transformer/detail/kernels/latent_kl_positions.hpp"
#endif

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

/// True if the kernels can take these logits; the others go the way of LibTorch operations.
inline bool takes_latent_kl(const at::Tensor& z_logits, const LatentSettings& settings) {
  return FREE_TRANSFORMER_VECTOR_KERNELS && z_logits.device().is_cpu() && z_logits.scalar_type() != at::kDouble &&
         !settings.prior_logits.defined() && !z_logits.is_neg() && !z_logits._is_zerotensor() &&
         (z_logits.stride(-1) == 1 || z_logits.size(-1) == 1);
}

/// Mean over the batch of a position's KL, from its sums.
inline double mean_kl(const at::Tensor& sums_) {
  const double* sums = sums_.data_ptr<double>();
  double kl = 0;
  for (int64_t bit = latent_sum_count; bit < sums_.numel(); ++bit) kl += sums[bit];
  return kl / sums[latent_weight_sum];
}

/// The hinge of the batch's mean is known last: below it nothing counts.
inline void close_if_below_budget(double free_bits, LatentRows& rows) {
  if (!(mean_kl(rows.sums) < free_bits)) return;
  rows.sums.data_ptr<double>()[penalty_sum] = 0;
  if (rows.penalty.defined()) rows.penalty.zero_();
  if (rows.gradient.defined()) rows.gradient.zero_();
}

inline double latent_weight(const at::Tensor& z_logits, const LatentSettings& settings) {
  const int64_t rows = z_logits.numel() / z_logits.size(-1);
  if (!settings.token_weight.defined()) return static_cast<double>(rows);
  const double* weights = settings.token_weight.data_ptr<double>();
  return pairwise_sum(0, rows, [&](int64_t row) { return weights[row]; });
}

#if FREE_TRANSFORMER_VECTOR_KERNELS
/// The job's positions on LibTorch's threads. Writes the sums in the order of `LatentSum`.
inline void process_positions(const LatentJob& job, int64_t positions, double* sums) {
  const int64_t blocks = (positions + positions_of_block - 1) / positions_of_block;
  const auto width = static_cast<size_t>(latent_sum_count + job.bits);
  std::vector<double> of_blocks(static_cast<size_t>(blocks) * width);
  const int64_t grain = std::max<int64_t>(1, 32768 / (positions_of_block * job.bits));
  parallel_rows(blocks, grain, [&](int64_t first_block, int64_t last_block) {
    LatentGroup group(job.bits);
    for (int64_t block = first_block; block < last_block; ++block) {
      double* of_block = of_blocks.data() + static_cast<size_t>(block) * width;
      const LatentSums block_sums =
          process_block(job, block * positions_of_block, std::min(positions, (block + 1) * positions_of_block), group,
                        of_block + latent_sum_count);
      of_block[penalty_sum] = block_sums.penalty;
      of_block[latent_weight_sum] = block_sums.weight;
      of_block[active_sum] = block_sums.active;
    }
  });
  for (size_t column = 0; column < width; ++column) {
    sums[column] =
        pairwise_sum(0, blocks, [&](int64_t block) { return of_blocks[static_cast<size_t>(block) * width + column]; });
  }
}
#endif

/// All positions. `scale` is that of an earlier call, or undefined: then it follows from the normalization. upstream is [N]
/// float64 and multiplies the scale, or undefined.
inline LatentRows latent_rows(Hinge hinge, const at::Tensor& z_logits, const LatentSettings& settings,
                              const Normalization& normalization, const at::Tensor& scale, const at::Tensor& upstream,
                              const WantedOfLatents& wanted) {
#if FREE_TRANSFORMER_VECTOR_KERNELS
  const int64_t bits = z_logits.size(-1), rows = z_logits.numel() / bits;
  LatentRows result;
  const double weight = latent_weight(z_logits, settings);
  result.scale = scale.defined() ? scale
                                 : at::scalar_tensor(loss_scale(normalization, weight, weight),
                                                     z_logits.options().dtype(at::kDouble));
  result.sums = at::zeros({latent_sum_count + bits}, z_logits.options().dtype(at::kDouble));
  if (wanted.penalty) result.penalty = at::empty({rows}, z_logits.options().dtype(at::kFloat));
  if (wanted.gradient) result.gradient = empty_on_large_pages(z_logits.sizes(), z_logits.options());
  const RowOffsets z_rows(z_logits);
  LatentJob job{};
  job.z_logits = z_logits.data_ptr();
  job.element = element_of(z_logits.scalar_type());
  job.z_rows = &z_rows;
  job.bits = bits;
  job.hinge = hinge;
  job.free_bits = settings.free_bits;
  job.token_weight = settings.token_weight.defined() ? settings.token_weight.data_ptr<double>() : nullptr;
  job.gradient = wanted.gradient ? result.gradient.data_ptr() : nullptr;
  const at::Tensor adjacent_upstream = upstream.defined() ? upstream.contiguous() : upstream;
  job.upstream = upstream.defined() ? adjacent_upstream.data_ptr<double>() : nullptr;
  job.scale = host_value(result.scale);
  job.penalty = wanted.penalty ? result.penalty.data_ptr<float>() : nullptr;
  process_positions(job, rows, result.sums.data_ptr<double>());
  if (hinge == Hinge::batch_mean) close_if_below_budget(settings.free_bits, result);
  return result;
#else
  TORCH_INTERNAL_ASSERT(false, int(hinge), z_logits, settings.free_bits, normalization.tensor, scale, upstream,
                        wanted.penalty, wanted.gradient);
#endif
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
