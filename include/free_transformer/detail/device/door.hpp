/// The losses by kernels that are compiled at run time, behind the signatures that all ways of computing them share. No
/// result means that the kernels could not be launched, which is said once, and LibTorch's operations are to be taken.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/hinge.hpp"
#include "free_transformer/detail/settings.hpp"
#if FREE_TRANSFORMER_DEVICE_KERNELS
#include "free_transformer/detail/device/cross_entropy.hpp"
#include "free_transformer/detail/device/latent_kl.hpp"
#include "free_transformer/detail/device/trust.hpp"
#endif

namespace free_transformer::FREE_TRANSFORMER_DETAIL::device {

#if FREE_TRANSFORMER_DEVICE_KERNELS

inline bool takes_cross_entropy(const at::Tensor& logits, const CrossEntropySettings& settings) {
  return is_kernel_device(logits.device()) && can_read(logits, settings) && is_trusted(Loss::cross_entropy, logits);
}

/// See `ReconstructionScale`; two launches.
inline std::optional<CrossEntropyPositions> cross_entropy_positions(const CrossEntropySettings& settings,
                                                                    int64_t classes, at::ScalarType /*type*/,
                                                                    const Normalization& normalization) {
  CrossEntropyBatch batch;
  const auto place = place_of(settings.targets.device());
  if (!was_launched(place ? launch_scales(settings, classes, normalization, *place, batch) : no_stream)) return {};
  CrossEntropyPositions positions;
  positions.scales = batch.scales;
  return positions;
}

/// One launch, and two for sums.
inline std::optional<CrossEntropyOfRows> cross_entropy_rows(const at::Tensor& logits,
                                                            const CrossEntropySettings& settings,
                                                            const CrossEntropyPositions& positions,
                                                            const at::Tensor& gradient, const at::Tensor& upstream,
                                                            const WantedOfRows& wanted) {
  const auto place = place_of(logits.device());
  if (!was_launched(place ? "" : no_stream)) return {};
  CrossEntropyRowResults rows;
  if (wanted.sums || wanted.each) rows = empty_rows(settings.targets, wanted.prediction);
  if (wanted.entropy) rows.entropy = at::empty_like(rows.nll);
  CrossEntropyBatch batch;
  batch.scales = positions.scales;
  if (!was_launched(launch_rows(logits, settings, batch.likelihood_scale(), batch.z_scale(), gradient,
                                readable_upstream(upstream), rows, *place))) {
    return {};
  }
  CrossEntropyOfRows result{rows, {}, {}};
  if (!wanted.sums) return result;
  batch.workspace = workspace_of(batch.scales.options(), partial_sums_of_batch(settings.targets.numel()));
  if (!was_launched(launch_sums(settings, logits.size(-1), batch, rows, *place, result.sums, result.loss))) return {};
  return result;
}

inline bool takes_latent_kl(const at::Tensor& z_logits, const LatentSettings& settings) {
  return is_kernel_device(z_logits.device()) && can_read(z_logits, settings) && is_trusted(Loss::latent_kl, z_logits);
}

/// Three launches at most without an upstream; one with it, and two more for the batch's mean.
inline std::optional<LatentRows> latent_rows(kernels::Hinge hinge, const at::Tensor& z_logits,
                                             const LatentSettings& settings, const Normalization& normalization,
                                             const at::Tensor& scale, const at::Tensor& upstream,
                                             const WantedOfLatents& wanted) {
  const auto place = place_of(z_logits.device());
  if (!was_launched(place ? "" : no_stream)) return {};
  LatentRowResults rows;
  const bool is_first = !scale.defined();
  if (is_first || hinge == kernels::Hinge::batch_mean) {
    if (!was_launched(launch_latent_rows(hinge, z_logits, settings, normalization, wanted.penalty,
                                         is_first && wanted.gradient, *place, rows))) {
      return {};
    }
  }
  LatentRows result{rows.sums, scale, rows.loss, rows.penalty, rows.gradient, {}};
  if (is_first) {
    result.scale = rows.totals.select(0, 0);
    return result;
  }
  const at::Tensor factor = scale.to(z_logits.device());  // LibTorch's operations leave it on the host
  const at::Tensor mean_kl = rows.totals.defined() ? rows.totals.select(0, 1) : factor;  // no other hinge looks at it
  if (!was_launched(launch_latent_gradient(hinge, z_logits, settings, factor, mean_kl, readable_upstream(upstream),
                                           *place, result.gradient))) {
    return {};
  }
  return result;
}

#else

inline bool takes_cross_entropy(const at::Tensor&, const CrossEntropySettings&) { return false; }
inline std::optional<CrossEntropyPositions> cross_entropy_positions(const CrossEntropySettings&, int64_t,
                                                                    at::ScalarType, const Normalization&) {
  return {};
}
inline std::optional<CrossEntropyOfRows> cross_entropy_rows(const at::Tensor&, const CrossEntropySettings&,
                                                            const CrossEntropyPositions&, const at::Tensor&,
                                                            const at::Tensor&, const WantedOfRows&) {
  return {};
}
inline bool takes_latent_kl(const at::Tensor&, const LatentSettings&) { return false; }
inline std::optional<LatentRows> latent_rows(kernels::Hinge, const at::Tensor&, const LatentSettings&,
                                             const Normalization&, const at::Tensor&, const at::Tensor&,
                                             const WantedOfLatents&) {
  return {};
}

#endif

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::device
