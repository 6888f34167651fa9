/// The door of the latent KL: where its positions are computed.
#pragma once

#include <ATen/ATen.h>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/device/door.hpp"
#include "free_transformer/detail/kernels/hinge.hpp"
#include "free_transformer/detail/kernels/latent_kl.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/plain/hinged_kl.hpp"
#include "free_transformer/detail/plain/latent_kl.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// All positions. `scale` is that of an earlier call, or undefined: then it follows from the normalization. upstream is [N]
/// in the widest type and multiplies the scale, or undefined.
template <typename FreeBits>
LatentRows latent_rows(const at::Tensor& z_logits, const LatentSettings& settings, const Normalization& normalization,
                       const at::Tensor& scale, const at::Tensor& upstream, const WantedOfLatents& wanted) {
  if constexpr (kernels::hinge_of<FreeBits>.has_value()) {
    constexpr auto hinge = *kernels::hinge_of<FreeBits>;
    if (kernels::takes_latent_kl(z_logits, settings)) {
      return kernels::latent_rows(hinge, z_logits, settings, normalization, scale, upstream, wanted);
    }
    if (device::takes_latent_kl(z_logits, settings)) {
      if (auto rows = device::latent_rows(hinge, z_logits, settings, normalization, scale, upstream, wanted)) {
        return *rows;
      }
    }
    if (plain::takes_few_operations(z_logits, settings)) {
      return plain::latent_rows_in_few_operations(hinge, z_logits, settings, normalization, scale, upstream, wanted);
    }
  }
  return plain::latent_rows<FreeBits>(z_logits, settings, normalization, scale, upstream, wanted);
}

/// The final value.
inline at::Tensor reduced_loss(const LatentRows& rows, at::ScalarType type) {
  if (rows.loss.defined()) return rows.loss;
  if (!rows.sums.device().is_cpu()) {
    at::Tensor loss = at::empty({}, rows.sums.options().dtype(type));
    return at::mul_out(loss, rows.sums[penalty_sum], rows.scale);
  }
  return scalar_of_host(rows.sums.data_ptr<double>()[penalty_sum] * host_value(rows.scale), rows.sums.options(), type);
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
