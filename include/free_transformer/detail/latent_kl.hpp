/// The door of the latent KL: where its positions are computed.
#pragma once

#include <ATen/ATen.h>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/hinge.hpp"
#include "free_transformer/detail/kernels/latent_kl.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/plain/latent_kl.hpp"
#include "free_transformer/detail/positions.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

template <typename FreeBits>
bool is_latent_kl_by_kernel(const at::Tensor& z_logits, const LatentSettings& settings) {
  return kernels::hinge_of<FreeBits>.has_value() && kernels::takes_latent_kl(z_logits, settings);
}

/// What every penalty is multiplied by on its way to the loss: 0-dim in the widest type.
template <typename FreeBits>
at::Tensor latent_scale(const at::Tensor& z_logits, const LatentSettings& settings,
                        const Normalization& normalization) {
  return is_latent_kl_by_kernel<FreeBits>(z_logits, settings) ? kernels::latent_scale(z_logits, settings, normalization)
                                                              : plain::latent_scale(z_logits, settings, normalization);
}

/// All positions. upstream is [N] in the widest type and multiplies the scale, or undefined.
template <typename FreeBits>
LatentRows latent_rows(const at::Tensor& z_logits, const LatentSettings& settings, const at::Tensor& scale,
                       const at::Tensor& upstream, const WantedOfLatents& wanted) {
  if constexpr (kernels::hinge_of<FreeBits>.has_value()) {
    if (kernels::takes_latent_kl(z_logits, settings)) {
      return kernels::latent_rows(*kernels::hinge_of<FreeBits>, z_logits, settings, scale, upstream, wanted);
    }
  }
  return plain::latent_rows<FreeBits>(z_logits, settings, scale, upstream, wanted);
}

/// The final value, by a scale that was known before the sums.
inline at::Tensor reduced_loss(const LatentRows& rows, const at::Tensor& scale, at::ScalarType type) {
  if (!scale.device().is_cpu()) return (rows.sums[penalty_sum] * scale).to(type);
  return at::scalar_tensor(rows.sums.data_ptr<double>()[penalty_sum] * host_value(scale),
                           rows.sums.options().dtype(type));
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
