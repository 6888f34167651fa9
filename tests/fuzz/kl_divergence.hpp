/// compute_kl_divergence under each of the library's policies.
#pragma once

#include <ATen/ATen.h>

#include <free_transformer/kl_divergence.hpp>

#include "choices.hpp"
#include "input.hpp"
#include "latent_equations.hpp"
#include "paths.hpp"
#include "random_options.hpp"
#include "refusal.hpp"

namespace fuzz {

/// Of each position, with weights and normalizer: the loss is `losses` or their sum.
struct ExpectedKL {
  Expected losses;          ///< [N]
  Expected gradient;        ///< [N, H]
  Expected prior_gradient;  ///< [N, H]
};

inline int64_t some_latent_dim(Choices& choices) {
  return choices.one_of<int64_t>({16, 1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 33}, {0});
}

inline Policy some_policy(Choices& choices) {
  return choices.one_of({Policy::per_position, Policy::per_bit, Policy::batch_mean});
}

/// Calls with(FreeBits()) for the policy.
template <typename With>
auto with_policy(Policy policy, const With& with) {
  if (policy == Policy::per_bit) return with(free_transformer::PerBit());
  if (policy == Policy::batch_mean) return with(free_transformer::BatchMean());
  return with(free_transformer::PerPosition());
}

/// z_logits [N, H]; mask [N] says which positions may count, unless it is undefined.
inline ExpectedKL expected_kl(const at::Tensor& z_logits, const KLDivergenceOptions& options, Policy policy,
                              const at::Tensor& mask, at::ScalarType type) {
  at::Tensor weight = options.token_weight().defined() ? options.token_weight().to(at::kDouble).reshape({-1})
                                                       : at::ones({z_logits.size(0)}, at::kDouble);
  if (mask.defined()) weight = weight * mask;
  BitKL bits = kl_from_uniform(z_logits, type);
  if (options.prior_logits().defined()) {
    const at::Tensor prior = options.prior_logits().to(at::kDouble).reshape({-1, z_logits.size(1)});
    bits = kl_from_prior(z_logits, prior.expand_as(z_logits), type);
  }
  const LatentTerms terms = latent_terms(bits, weight, options.free_bits(), policy, type);
  const double scale = scale_of(options, weight, weight);
  const at::Tensor factor = weight * scale, counts = weight > 0;
  const auto scaled = [&](const Expected& of, const at::Tensor& by, const at::Tensor& where) {
    if (!of.value.defined()) return of;
    Expected all = of.times(by);
    all.tolerance = all.tolerance + 4 * arithmetic_step(type) * all.value.abs();
    return (scale == infinity ? all.known_where(at::zeros_like(all.value, at::kBool)) : all).only(where);
  };
  return {scaled(terms.penalty, factor, counts), scaled(terms.gradient, factor.unsqueeze(1), counts.unsqueeze(1)),
          scaled(terms.prior_gradient, factor.unsqueeze(1), counts.unsqueeze(1))};
}

/// The prior as a leaf of its own in these options; undefined if there is none.
inline at::Tensor take_prior(KLDivergenceOptions& options) {
  if (!options.prior_logits().defined() || !options.prior_logits().is_floating_point()) return {};
  at::Tensor leaf = options.prior_logits().clone().requires_grad_();
  options.prior_logits(leaf);
  return leaf;
}

inline void add_prior(Gradients& gradients, const at::Tensor& prior, const Expected& of_rows) {
  if (!prior.defined()) return;
  const auto& value = of_rows.value;
  if (prior.numel() == value.numel()) return gradients.add("prior_logits", prior, of_rows.reshape(prior.sizes()));
  const at::Tensor rounding = value.abs().sum(0) * static_cast<double>(value.size(0)) * 1e-15;
  gradients.add("prior_logits", prior, {value.sum(0), of_rows.tolerance.sum(0) + rounding, of_rows.is_known.all(0)});
}

inline void fuzz_kl_divergence(Choices& choices) {
  const Shape positions = some_positions(choices);
  const int64_t latent_dim = some_latent_dim(choices);
  const Input input = some_input(choices, positions, latent_dim);
  const auto options = some_latent_options(choices, positions, latent_dim);
  const Policy policy = some_policy(choices);
  const Upstream upstream(choices);
  ExpectedKL expected;
  if (!choices.has_gone_wrong()) expected = expected_kl(input.rows(), options, policy, {}, input.type());
  on_each_path([&](bool is_strided) {
    const Handed z_logits(is_strided ? input.with_strided_rows() : input);
    auto own_options = options;
    const at::Tensor prior = take_prior(own_options);
    const Memory memory({z_logits.tensor, z_logits.leaf, own_options.prior_logits(), options.token_weight()});
    at::Tensor loss;
    if (is_refused(choices.has_gone_wrong() ? Refusal::required : Refusal::wrong, memory, [&] {
          loss = with_policy(policy, [&](auto free_bits) {
            return free_transformer::compute_kl_divergence<decltype(free_bits)>(z_logits.tensor, own_options);
          });
        })) {
      return;
    }
    if (loss.scalar_type() != arithmetic(input.type())) fail("type of the loss");
    check("loss", loss, reduced(expected.losses, options.reduction(), positions), 2);
    const at::Tensor factors =
        upstream.of_positions(expected.losses.value.numel(), is_none(options.reduction())).unsqueeze(1);
    Gradients gradients;
    gradients.add("z_logits", z_logits, expected.gradient.times(factors));
    if (prior.defined()) add_prior(gradients, prior, expected.prior_gradient.times(factors));
    gradients.check_those_of(loss, upstream.like(loss), Upstream::growth);
    memory.check_untouched("forward or backward");
  });
}

}  // namespace fuzz
