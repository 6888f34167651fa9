/// What the whole loss refuses, before either term has written anything.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/enum.h>

#include <type_traits>
#include <variant>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/checks/arguments.hpp"
#include "free_transformer/detail/checks/latent.hpp"
#include "free_transformer/detail/checks/normalization.hpp"
#include "free_transformer/detail/checks/reconstruction.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/positions.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// What the terms do not check themselves: their balance.
template <typename Options>
void check_balance(const char* function, const Options& options) {
  check_not_negative(function, "beta_kl", options.beta_kl());
  constexpr auto is_unreduced = [](const auto& reduction) {
    return std::holds_alternative<torch::enumtype::kNone>(reduction);
  };
  TORCH_CHECK(is_unreduced(options.reconstruction().reduction()) == is_unreduced(options.kl().reduction()), function,
              ": reduction must be kNone for both terms or for neither, got kNone for one alone");
}

/// All settings, which a module can refuse before it has seen a tensor.
template <typename Options>
void check_vae_options(const char* function, const Options& options) {
  check_balance(function, options);
  check_reconstruction_options("compute_reconstruction_loss", options.reconstruction());
  check_normalizer("compute_reconstruction_loss", options.reconstruction().normalizer());
  check_latent_options("compute_kl_divergence", options.kl());
  check_normalizer("compute_kl_divergence", options.kl().normalizer());
}

/// The positions that targets say something of.
inline at::IntArrayRef positions_of_targets(const at::Tensor& targets) {
  return targets.is_floating_point() && targets.dim() > 0 ? shape_of_positions(targets) : targets.sizes();
}

template <typename Logits>
inline constexpr bool is_dense = std::is_convertible_v<const Logits*, const at::Tensor*>;

/// What the latent term saves of the memory that logits given inplace lie in, as a copy: autograd takes all of that memory
/// for written to, also where it is other columns of one projection.
template <typename Logits, typename Options>
at::Tensor beside_logits(const at::Tensor& tensor, const Logits& logits, const Options& options) {
  if constexpr (is_dense<Logits>) {
    if (options.reconstruction().inplace() && tensor.defined() && tensor.is_alias_of(logits)) return tensor.clone();
  }
  return tensor;
}

/// The latent term's settings, with all that is refused of z_logits beside these logits and targets.
template <typename Logits, typename Options>
LatentSettings checked_latent_term(const Logits& logits, const at::Tensor& targets, const at::Tensor& z_logits,
                                   const Options& options) {
  constexpr const char* function = "compute_vae_loss";
  check_defined(function, "z_logits", z_logits);
  if constexpr (is_dense<Logits>) {  // what the other term is to refuse, but this one looks at first
    constexpr const char* other_function = "compute_reconstruction_loss";
    check_logits(other_function, "logits", logits);
    check_defined(other_function, "targets", targets);
    check_device(other_function, "targets", targets, "the logits", logits.device());
  }
  if (targets.defined()) check_device(function, "z_logits", z_logits, "the logits", targets.device());
  auto settings = checked_latent_settings("compute_kl_divergence", z_logits, options.kl(), options.kl().token_weight());
  const bool is_unreduced = std::holds_alternative<torch::enumtype::kNone>(options.kl().reduction());
  if (targets.defined() && (is_unreduced || options.mask_ignored_latents())) {
    TORCH_CHECK(shape_of_positions(z_logits) == positions_of_targets(targets), function,
                ": z_logits must have the positions of the targets with ",
                is_unreduced ? "kNone, " : "mask_ignored_latents, ", positions_of_targets(targets), ", got shape ",
                z_logits.sizes());
  }
  settings.prior_logits = beside_logits(settings.prior_logits, logits, options);
  return settings;
}

/// The same with weight 0 where the target does not count, if the options ask for it.
template <typename Options>
LatentSettings masked_like_targets(LatentSettings settings, const at::Tensor& targets, const Options& options) {
  if (!options.mask_ignored_latents()) return settings;
  const auto& reconstruction = options.reconstruction();
  constexpr const char* function = "compute_reconstruction_loss";  // which has not looked at them yet
  check_defined(function, "targets", targets);
  checked_token_weight(function, reconstruction.token_weight(), positions_of_targets(targets), targets.device(),
                       widest_type(targets.device()));
  const at::Tensor of_targets =
      left_out_positions(targets, reconstruction.ignore_index(), reconstruction.token_weight());
  if (!of_targets.defined()) return settings;
  const at::Tensor left_out = of_targets.reshape({-1});
  settings.token_weight = settings.token_weight.defined() ? settings.token_weight.masked_fill(left_out, 0)
                                                          : (left_out == 0).to(widest_type(left_out.device()));
  return settings;
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
