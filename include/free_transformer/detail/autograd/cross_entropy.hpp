/// Cross entropy as a node of the graph. Saved for backward: the logits, and five numbers a position.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <utility>

#include "free_transformer/detail/cross_entropy_terms.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/plain/cross_entropy.hpp"
#include "free_transformer/detail/plain/row_blocks.hpp"

namespace free_transformer::detail {

/// Everything about the positions that backward needs beside the logits.
struct CrossEntropyState : torch::CustomClassHolder {
  CrossEntropyTerms terms;
  plain::CrossEntropyPositions positions;
  plain::CrossEntropyRows rows;
  at::Tensor likelihood_scale, z_scale;  ///< 0-dim, in the type of arithmetic
};

struct CrossEntropyResult {
  at::Tensor loss;
  at::Tensor sums;
};

/// The loss, and in `state` what its gradient needs.
inline CrossEntropyResult cross_entropy_forward(const at::Tensor& logits, const Normalization& normalization,
                                                bool count_hits, CrossEntropyState& state) {
  const auto type = arithmetic_type(logits.scalar_type());
  const auto& terms = state.terms;
  state.positions = plain::cross_entropy_positions(terms, logits.size(-1), type);
  state.rows = plain::cross_entropy_rows(logits, terms, state.positions);
  const auto losses = plain::cross_entropy_losses(state.rows, terms, state.positions);
  const at::Tensor sums = plain::reconstruction_sums(state.rows, losses, terms, state.positions, count_hits);
  const at::Tensor likelihood_scale = loss_scale(normalization, sums[likelihood_weight_sum]);
  const at::Tensor z_scale = loss_scale(normalization, sums[token_weight_sum]);
  state.likelihood_scale = likelihood_scale.to(type);
  state.z_scale = z_scale.to(type);
  if (normalization.reduction == ReductionKind::none) {
    const at::Tensor loss = losses.z.defined() ? losses.likelihood + losses.z : losses.likelihood;
    return {loss.reshape(logits.sizes().slice(0, static_cast<size_t>(logits.dim() - 1))), sums};
  }
  at::Tensor loss = sums[likelihood_loss_sum] * likelihood_scale;
  if (terms.z_loss > 0) loss = loss + sums[z_loss_sum] * z_scale;
  return {loss.to(type), sums};
}

/// The gradient from what was saved; while a graph of the gradient is built (create_graph) it is differentiable, too.
inline at::Tensor cross_entropy_backward(const at::Tensor& logits, const CrossEntropyState& state,
                                         const at::Tensor& upstream) {
  const auto type = arithmetic_type(logits.scalar_type());
  const at::Tensor flat = upstream.dim() == 0 ? upstream.to(type) : upstream.reshape({-1}).to(type);
  const at::Tensor likelihood_scale = flat * state.likelihood_scale;
  const at::Tensor z_scale = flat * state.z_scale;
  at::Tensor gradient;
  {
    const at::NoGradGuard no_grad;
    gradient = plain::cross_entropy_gradient(logits, state.terms, state.positions, state.rows, likelihood_scale, z_scale);
  }
  if (!at::GradMode::is_enabled()) return gradient;
  const at::Tensor expression = plain::differentiable_cross_entropy_gradient(logits, state.terms, state.positions,
                                                                            likelihood_scale, z_scale);
  return gradient + (expression - expression.detach());  // the exact value, with the derivative of the expression
}

struct CrossEntropyFunction : torch::autograd::Function<CrossEntropyFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& logits,
                            const CrossEntropyTerms& terms, const Normalization& normalization, bool count_hits,
                            at::Tensor* sums) {
    auto state = c10::make_intrusive<CrossEntropyState>();
    state->terms = terms;
    CrossEntropyResult result = cross_entropy_forward(logits, normalization, count_hits, *state);
    *sums = std::move(result.sums);
    context->save_for_backward({logits});
    context->saved_data["state"] = c10::IValue::make_capsule(std::move(state));
    return result.loss;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& upstream) {
    const at::Tensor logits = context->get_saved_variables()[0];
    const auto capsule = context->saved_data["state"].toCapsule();
    const auto& state = static_cast<const CrossEntropyState&>(*capsule);
    return {cross_entropy_backward(logits, state, upstream[0]), {}, {}, {}, {}};
  }
};

inline CrossEntropyResult cross_entropy(const at::Tensor& logits, const CrossEntropyTerms& terms,
                                        const Normalization& normalization, bool count_hits) {
  if (at::GradMode::is_enabled() && logits.requires_grad()) {
    CrossEntropyResult result;
    result.loss = CrossEntropyFunction::apply(logits, terms, normalization, count_hits, &result.sums);
    return result;
  }
  const at::NoGradGuard no_grad;
  CrossEntropyState state;
  state.terms = terms;
  return cross_entropy_forward(logits, normalization, count_hits, state);
}

}  // namespace free_transformer::detail
