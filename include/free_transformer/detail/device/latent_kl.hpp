/// The free-bits KL of float32, float16 and bfloat16 logits on a device by kernels that are compiled at run time, from
/// tensors to tensors. No value comes to the host and nothing waits.
///
/// With gradient and sums it is three launches, one of which zeroes a workspace. Each function returns why it could not
/// launch, or an empty string.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <string>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/device/launch.hpp"
#include "free_transformer/detail/device/tensor_arguments.hpp"
#include "free_transformer/detail/kernels/hinge.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::device {

/// True for logits and settings of the kind that the kernels read; whether the device has kernels is another question.
inline bool can_read(const at::Tensor& z_logits, const LatentSettings& settings) {
  return element_of(z_logits.scalar_type()) && !settings.prior_logits.defined() && is_plain_memory(z_logits) &&
         z_logits.dim() > 0 && can_take_bits(z_logits.size(-1)) && row_layout_of(z_logits);
}

struct LatentRowResults {
  at::Tensor sums;      ///< see `LatentSum`
  at::Tensor totals;    ///< [2] float64: the scale of every penalty, the batch's mean KL
  at::Tensor loss;      ///< 0-dim float32
  at::Tensor penalty;   ///< [N] float32, weighted, or undefined
  at::Tensor gradient;  ///< of the shape and type of z_logits, contiguous, or undefined
};

inline LatentJob latent_job_of(const at::Tensor& z_logits, const LatentSettings& settings, const at::Tensor& upstream) {
  LatentJob job{};
  job.z_logits = z_logits.data_ptr();
  job.z_rows = *row_layout_of(z_logits);
  job.rows = z_logits.numel() / z_logits.size(-1);
  job.free_bits = settings.free_bits;
  job.token_weight = doubles_of(settings.token_weight);
  job.upstream = doubles_of(upstream);
  job.upstream_stride = stride_of_upstream(upstream);
  return job;
}

/// All positions; at most three launches.
inline std::string launch_latent_rows(kernels::Hinge hinge, const at::Tensor& z_logits, const LatentSettings& settings,
                                      const Normalization& normalization, bool wants_penalty, bool wants_gradient,
                                      const Place& place, LatentRowResults& rows, KernelCache& cache = kernel_cache()) {
  const auto doubles = z_logits.options().dtype(at::kDouble);
  const int64_t bits = z_logits.size(-1);
  LatentJob job = latent_job_of(z_logits, settings, /*upstream=*/{});
  const at::Tensor workspace = workspace_of(doubles, partial_sums_of_positions(job.rows, bits));
  const at::Tensor divisor = divisor_on(z_logits.device(), normalization);
  rows.sums = at::empty({latent_sum_count + bits}, doubles);
  rows.totals = at::empty({2}, doubles);
  rows.loss = at::empty({}, doubles.dtype(at::kFloat));
  if (wants_penalty) rows.penalty = at::empty({job.rows}, doubles.dtype(at::kFloat));
  if (wants_gradient) rows.gradient = at::empty(z_logits.sizes(), z_logits.options());
  job.gradient = wants_gradient ? rows.gradient.data_ptr() : nullptr;
  job.penalty = wants_penalty ? rows.penalty.data_ptr<float>() : nullptr;
  job.divisor = divisor_of(normalization, divisor);
  job.sums = rows.sums.data_ptr<double>();
  job.totals = rows.totals.data_ptr<double>();
  job.loss = rows.loss.data_ptr<float>();
  job.ticket = ticket_of(workspace);
  job.partial = partial_of(workspace);
  return launch_latent_kl(job, *element_of(z_logits.scalar_type()), hinge, bits, place, cache);
}

/// The gradient for `upstream`, 0-dim or [N] float64, from the totals of an earlier call; one launch.
inline std::string launch_latent_gradient(kernels::Hinge hinge, const at::Tensor& z_logits,
                                          const LatentSettings& settings, const at::Tensor& scale,
                                          const at::Tensor& mean_kl, const at::Tensor& upstream, const Place& place,
                                          at::Tensor& gradient, KernelCache& cache = kernel_cache()) {
  gradient = at::empty(z_logits.sizes(), z_logits.options());
  LatentJob job = latent_job_of(z_logits, settings, upstream);
  job.gradient = gradient.data_ptr();
  job.scale = scale.data_ptr<double>();
  job.mean_kl = mean_kl.data_ptr<double>();
  return launch_latent_kl(job, *element_of(z_logits.scalar_type()), hinge, z_logits.size(-1), place, cache);
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::device
