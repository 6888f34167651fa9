/// compute_reconstruction_loss of dense logits.
#pragma once

#include <ATen/ATen.h>

#include <free_transformer/reconstruction_loss.hpp>

#include "choices.hpp"
#include "cross_entropy_equations.hpp"
#include "input.hpp"
#include "paths.hpp"
#include "random_options.hpp"
#include "refusal.hpp"

namespace fuzz {

/// Of each position, with weights and normalizer: the loss is `losses` or their sum.
struct ExpectedReconstruction {
  at::Tensor counts;  ///< [N]
  Expected losses;    ///< [N]
  Expected gradient;  ///< [N, V]
};

inline at::Tensor token_weights(const at::Tensor& token_weight, int64_t count) {
  return token_weight.defined() ? token_weight.to(at::kDouble).reshape({-1}) : at::ones({count}, at::kDouble);
}

/// logits [N, V], of which those of the library may be further off by logits_error, [N, 1].
inline ExpectedReconstruction expected_reconstruction(const at::Tensor& logits, const at::Tensor& logits_error,
                                                      const TargetsAndOptions& of, at::ScalarType type) {
  const auto& options = of.options;
  const bool has_probabilities = of.targets.is_floating_point();
  at::Tensor targets = has_probabilities ? of.targets.reshape(logits.sizes()) : of.targets.to(at::kLong).reshape({-1});
  at::Tensor weight = token_weights(options.token_weight(), logits.size(0));
  if (!has_probabilities) weight = weight.masked_fill(targets == options.ignore_index(), 0);
  ExpectedReconstruction expected;
  expected.counts = weight > 0;
  const at::Tensor left_out = expected.counts.logical_not().unsqueeze(1);
  if (!has_probabilities) targets = targets.masked_fill(left_out.squeeze(1), 0);
  const auto terms = cross_entropy_terms(logits.masked_fill(left_out, 0), logits_error.masked_fill(left_out, 0),
                                         targets, options, type);

  at::Tensor likelihood_weight = weight;
  if (!has_probabilities && options.weight().defined()) {
    likelihood_weight = weight * options.weight().to(at::kDouble).index_select(0, targets);
  }
  const double scale = scale_of(options, likelihood_weight, weight), z_scale = scale_of(options, weight, weight);
  const auto scaled = [&](const Expected& likelihood, const Expected& z, const at::Tensor& factor,
                          const at::Tensor& counts) {
    Expected all = likelihood.times(factor * scale);
    if (options.z_loss() > 0) all = all.plus(z.times(factor * z_scale));
    all.tolerance = all.tolerance + 4 * arithmetic_step(type) * all.value.abs();
    // 0 · ∞, and ∞ times a loss that may have been rounded to 0
    const bool divides_by_0 = scale == infinity || z_scale == infinity;
    all =
        all.known_where(all.value.isnan().logical_not() | terms.softmax.is_sound.logical_not().reshape(factor.sizes()));
    return (divides_by_0 ? all.known_where(at::zeros_like(all.value, at::kBool)) : all).only(counts);
  };
  expected.losses = scaled(terms.likelihood, terms.z, weight, expected.counts);
  // A term may overflow before a small share or scale comes; in the gradient it is an infinite factor of probabilities of 0.
  at::Tensor largest_term = at::stack({terms.likelihood.value, terms.z.value, expected.losses.value}).abs().amax(0);
  if (has_probabilities || options.label_smoothing() > 0) {
    const at::Tensor& surprise = terms.softmax.surprise.value;
    largest_term = largest_term.maximum(surprise.masked_fill(surprise == infinity, 0).amax(-1));
  }
  const at::Tensor is_infinite = largest_term >= largest(arithmetic(type));
  expected.losses = expected.losses.known_where((is_infinite & expected.losses.value.isfinite()).logical_not());
  expected.gradient =
      scaled(terms.likelihood_gradient, terms.z_gradient, weight.unsqueeze(1), expected.counts.unsqueeze(1))
          .known_where(is_infinite.logical_not().unsqueeze(1));
  return expected;
}

/// In place is refused for logits that may overlap, or that are a leaf's own numbers.
inline Refusal refusal_of(const Choices& choices, const Input& logits, bool is_inplace) {
  if (choices.has_gone_wrong()) return Refusal::required;
  return is_inplace && (logits.is_view_of_leaf || logits.layout.may_overlap) ? Refusal::possible : Refusal::wrong;
}

/// All tensors that a call reads, with the logits first.
inline std::vector<at::Tensor> tensors_of(const Handed& logits, const TargetsAndOptions& of) {
  const auto& options = of.options;
  return {logits.tensor,          logits.leaf,      of.targets,
          options.token_weight(), options.weight(), options.normalizer().tensor().value_or(at::Tensor())};
}

inline void fuzz_reconstruction_loss(Choices& choices) {
  const Shape positions = some_positions(choices);
  const int64_t classes = choices.goes_wrong() ? 0 : some_classes(choices);
  const Input input = some_input(choices, positions, classes);
  auto of = some_targets_and_options(choices, positions, classes);
  of.options.inplace(choices.seldom(3));
  const Upstream upstream(choices);
  const auto reduction = of.options.reduction();
  ExpectedReconstruction expected;
  const at::Tensor exact = at::zeros({input.rows().size(0), 1}, at::kDouble);
  if (!choices.has_gone_wrong()) expected = expected_reconstruction(input.rows(), exact, of, input.type());
  on_each_path([&](bool is_strided) {
    const Handed logits(is_strided ? input.with_strided_rows() : input);
    Memory memory(tensors_of(logits, of));
    at::Tensor loss;
    if (is_refused(refusal_of(choices, input, of.options.inplace()), memory, [&] {
          loss = free_transformer::compute_reconstruction_loss(logits.tensor, of.targets, of.options);
        })) {
      return;
    }
    if (of.options.inplace()) memory.allow_writes(logits.input.layout);
    memory.check_untouched("forward");
    if (loss.scalar_type() != arithmetic(input.type())) fail("type of the loss");
    check("loss", loss, reduced(expected.losses, reduction, positions), 2);
    const at::Tensor factors = upstream.of_positions(expected.losses.value.numel(), is_none(reduction));
    Gradients gradients;
    gradients.add("logits", logits, expected.gradient.times(factors.unsqueeze(1)));
    gradients.check_those_of(loss, upstream.like(loss), Upstream::growth);
    if (of.options.inplace()) memory.allow_writes(logits.input.layout);
    memory.check_untouched("backward");
  });
}

}  // namespace fuzz
