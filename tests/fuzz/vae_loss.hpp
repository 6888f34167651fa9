/// compute_vae_loss of dense logits: both terms, their balance and their mask.
#pragma once

#include <ATen/ATen.h>

#include <free_transformer/vae_loss.hpp>

#include "choices.hpp"
#include "input.hpp"
#include "kl_divergence.hpp"
#include "paths.hpp"
#include "reconstruction_loss.hpp"
#include "refusal.hpp"

namespace fuzz {

struct VAECall {
  Input logits, z_logits;
  TargetsAndOptions tokens;
  free_transformer::VAELossOptions options;
  Policy policy = Policy::per_position;

  Reduction reduction() const { return options.reconstruction().reduction(); }
};

inline VAECall some_vae_call(Choices& choices) {
  VAECall call;
  const Shape positions = some_positions(choices);
  const int64_t classes = some_classes(choices);
  call.logits = some_input(choices, positions, classes);
  call.tokens = some_targets_and_options(choices, positions, classes);
  call.tokens.options.inplace(choices.seldom(3));
  auto& options = call.options;
  options.reconstruction(call.tokens.options);
  const bool needs_positions = is_none(call.reduction());
  options.mask_ignored_latents(choices.seldom(2));
  const bool has_positions = needs_positions || options.mask_ignored_latents() || choices.seldom(2);
  const Shape z_positions = has_positions ? positions : some_positions(choices);
  const int64_t latent_dim = some_latent_dim(choices);
  call.z_logits = some_input(choices, z_positions, latent_dim);
  auto kl = some_latent_options(choices, z_positions, latent_dim);
  if (needs_positions != is_none(kl.reduction()) && !choices.goes_wrong()) kl.reduction(call.reduction());
  options.kl(kl);
  options.beta_kl(choices.one_of({1.0, 0.5, 0.0, 3.0}, {-1.0, not_a_number, infinity}));
  options.kl_of_each_bit(choices.seldom(2));
  call.policy = some_policy(choices);
  return call;
}

/// A mean of one call without normalizers is what the metrics say of it, where anything is known of it.
inline void check_total(const free_transformer::LossMetrics& metrics, const at::Tensor& loss, const Expected& expected,
                        const VAECall& call) {
  const auto is_plain_mean = [](const auto& options) {
    return is_mean(options.reduction()) && !options.normalizer().number() && !options.normalizer().tensor();
  };
  const auto total = metrics.at("loss/total");
  if (!is_plain_mean(call.options.reconstruction()) || !is_plain_mean(call.options.kl())) return;
  const at::Tensor value = at::scalar_tensor(total, at::kDouble);
  check("loss/total", loss,
        {value, 2 * expected.tolerance + 4 * epsilon(at::kFloat) * value.abs() + smallest(at::kFloat),
         expected.is_known});
}

inline void fuzz_vae_loss(Choices& choices) {
  const VAECall call = some_vae_call(choices);
  const Upstream upstream(choices);
  const double beta = call.options.beta_kl();
  ExpectedReconstruction of_tokens;
  ExpectedKL of_latents;
  Expected total;
  if (!choices.has_gone_wrong()) {
    const at::Tensor logits = call.logits.rows();
    of_tokens =
        expected_reconstruction(logits, at::zeros({logits.size(0), 1}, at::kDouble), call.tokens, call.logits.type());
    of_latents =
        expected_kl(call.z_logits.rows(), call.options.kl(), call.policy,
                    call.options.mask_ignored_latents() ? of_tokens.counts : at::Tensor(), call.z_logits.type());
    const Expected likelihood = reduced(of_tokens.losses, call.reduction(), call.logits.positions());
    Expected kl = reduced(of_latents.losses, call.reduction(), call.logits.positions());
    if (beta == 0) kl = kl.known_where(kl.value < largest(at::kFloat));  // else 0 · ∞
    kl = kl.times(beta);
    total = likelihood.plus(kl);
    total.tolerance = total.tolerance + epsilon(at::kFloat) * (likelihood.value.abs() + kl.value.abs());
  }
  on_each_path([&](bool is_strided) {
    const Handed logits(is_strided ? call.logits.with_strided_rows() : call.logits);
    const Handed z_logits(is_strided ? call.z_logits.with_strided_rows() : call.z_logits);
    auto kl = call.options.kl();
    const at::Tensor prior = take_prior(kl);
    auto options = call.options;
    options.kl(kl);
    auto tensors = tensors_of(logits, call.tokens);
    tensors.insert(tensors.end(), {z_logits.tensor, z_logits.leaf, kl.prior_logits(), kl.token_weight()});
    Memory memory(tensors);
    free_transformer::VAELossOutput output;
    if (is_refused(refusal_of(choices, call.logits, call.tokens.options.inplace()), memory, [&] {
          output = with_policy(call.policy, [&](auto free_bits) {
            return free_transformer::compute_vae_loss<decltype(free_bits)>(logits.tensor, call.tokens.targets,
                                                                           z_logits.tensor, options);
          });
        })) {
      return;
    }
    if (call.tokens.options.inplace()) memory.allow_writes(logits.input.layout);
    memory.check_untouched("forward");
    check("loss", output.loss, total, 3);
    check_total(output.metrics, output.loss, total, call);
    const bool is_unreduced = is_none(call.reduction());
    const at::Tensor factors = upstream.of_positions(of_tokens.losses.value.numel(), is_unreduced).unsqueeze(1);
    const at::Tensor z_factors =
        beta * upstream.of_positions(of_latents.losses.value.numel(), is_unreduced).unsqueeze(1);
    Gradients gradients;
    gradients.add("logits", logits, of_tokens.gradient.times(factors));
    gradients.add("z_logits", z_logits, of_latents.gradient.times(z_factors));
    if (prior.defined()) add_prior(gradients, prior, of_latents.prior_gradient.times(z_factors));
    gradients.check_those_of(output.loss, upstream.like(output.loss), 4 * Upstream::growth);
    if (call.tokens.options.inplace()) memory.allow_writes(logits.input.layout);
    memory.check_untouched("backward");
  });
}

}  // namespace fuzz
