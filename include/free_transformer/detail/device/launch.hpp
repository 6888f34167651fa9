/// The losses on a device's rows, in pointers: each function launches what one part of a loss asks for, on a stream,
/// and neither waits nor allocates. All results are the device's.
///
/// The functions return why nothing was launched, or an empty string. Before a CUDA graph is captured, the same calls
/// must have been made once, so that the kernels are compiled.
#pragma once

#include <cstdint>
#include <string>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/device/jobs.hpp"
#include "free_transformer/detail/device/kernel_cache.hpp"
#include "free_transformer/detail/device/variant.hpp"
#include "free_transformer/detail/kernels/hinge.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::device {

/// One launch, before the rows: `job.scales` from targets and weights.
inline std::string launch_cross_entropy_scales(const CrossEntropyBatchJob& job, const Place& place,
                                               KernelCache& cache = kernel_cache()) {
  return cache.launch(Kernel::cross_entropy_scales, Variant{Text::cross_entropy_sums}, grid_of_batch(job.rows), place,
                      &job);
}

/// One launch; none without rows.
inline std::string launch_cross_entropy_rows(const CrossEntropyJob& job, Element element, int64_t rows,
                                             const Place& place, KernelCache& cache = kernel_cache()) {
  if (rows == 0) return "";
  return cache.launch(Kernel::cross_entropy_rows, variant_of(job, element), grid_of_rows(rows, job.columns, element),
                      place, &job);
}

/// One launch, after the rows: `job.sums`, and the loss if it is wanted.
inline std::string launch_cross_entropy_sums(const CrossEntropyBatchJob& job, const Place& place,
                                             KernelCache& cache = kernel_cache()) {
  return cache.launch(Kernel::cross_entropy_sums, Variant{Text::cross_entropy_sums}, grid_of_batch(job.rows), place,
                      &job);
}

/// With `job.sums`: sums, totals and loss, and the gradient and the penalties where they are wanted, by 1 launch, or 2
/// with a gradient or for the batch's hinge; `job.scale` and `job.mean_kl` need not be set. Without: gradient and
/// penalties from the totals of an earlier call, to which `job.scale` and `job.mean_kl` point, by 1 launch.
inline std::string launch_latent_kl(LatentJob job, Element element, kernels::Hinge hinge, int64_t bits,
                                    const Place& place, KernelCache& cache = kernel_cache()) {
  const Variant variant = variant_of(element, hinge, bits);
  const Grid grid = grid_of_positions(job.rows, bits);
  if (job.sums && hinge == kernels::Hinge::batch_mean) {
    LatentJob of_sums = job;
    of_sums.gradient = nullptr;
    of_sums.penalty = nullptr;
    std::string reason = cache.launch(Kernel::latent_kl_positions, variant, grid, place, &of_sums);
    if (!reason.empty() || !(job.gradient || job.penalty)) return reason;
    job.sums = nullptr;
    job.scale = job.totals;
    job.mean_kl = job.totals + 1;
  } else if (job.sums && job.gradient) {
    std::string reason = cache.launch(Kernel::latent_kl_scale, variant, grid_of_batch(job.rows), place, &job);
    if (!reason.empty()) return reason;
    job.scale = job.totals;
  }
  return cache.launch(Kernel::latent_kl_positions, variant, grid, place, &job);
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::device
