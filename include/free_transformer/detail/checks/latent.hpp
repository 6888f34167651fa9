/// What the latent term refuses.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <cstdint>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/checks/arguments.hpp"
#include "free_transformer/detail/checks/transforms.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/positions.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// The settings alone, which a module can refuse before it has seen a tensor.
template <typename Options>
void check_latent_options(const char* function, const Options& options) {
  TORCH_CHECK(options.latent_dim() >= 1, function, ": latent_dim must be >= 1, got ", options.latent_dim());
  check_not_negative(function, "free_bits", options.free_bits());
}

inline void check_latent_logits(const char* function, const at::Tensor& z_logits, int64_t latent_dim) {
  check_floating(function, "z_logits", z_logits);
  const bool is_channels_first = z_logits.dim() >= 3 && z_logits.size(1) == latent_dim;
  TORCH_CHECK(z_logits.dim() >= 1 && z_logits.size(-1) == latent_dim, function,
              ": z_logits must have latent_dim = ", latent_dim, " as its last size, got shape ", z_logits.sizes(),
              is_channels_first ? ": pass z_logits.movedim(1, -1)" : "");
  check_no_transform(function, "z_logits", z_logits);
}

inline void check_prior_logits(const char* function, const at::Tensor& z_logits, const at::Tensor& prior_logits) {
  if (!prior_logits.defined()) return;
  check_floating(function, "prior_logits", prior_logits);
  check_device(function, "prior_logits", prior_logits, "z_logits", z_logits.device());
  const bool one_for_all = prior_logits.dim() == 1 && prior_logits.size(0) == z_logits.size(-1);
  TORCH_CHECK(one_for_all || prior_logits.sizes() == z_logits.sizes(), function,
              ": prior_logits must have the shape [latent_dim] or that of z_logits, ", z_logits.sizes(), ", got ",
              prior_logits.sizes());
  check_no_transform(function, "prior_logits", prior_logits);
}

/// token_weight is that of the options, or what a mask has made of it.
template <typename Options>
LatentSettings checked_latent_settings(const char* function, const at::Tensor& z_logits, const Options& options,
                                       const at::Tensor& token_weight) {
  check_not_traced(function);
  check_latent_options(function, options);
  check_latent_logits(function, z_logits, options.latent_dim());
  check_prior_logits(function, z_logits, options.prior_logits());
  const auto device = z_logits.device();
  const at::Tensor weight = checked_token_weight(function, token_weight, shape_of_positions(z_logits), device,
                                                 arithmetic_type(z_logits.scalar_type()));
  return {weight.defined() ? weight.to(widest_type(device)) : weight, options.prior_logits(), options.free_bits()};
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
