/// Cross entropy as a node of the graph: by the vector kernels where they can, else in LibTorch operations.
///
/// The kernels finish the gradient in the forward pass, while a row is in the cache; backward hands it out, times what
/// comes from upstream. Saved then: the logits and their gradient. A second backward computes it anew. In LibTorch
/// operations, or with a gradient of its own for each position (kNone), backward computes the gradient; saved: the
/// logits, five numbers a position.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <utility>

#include "free_transformer/detail/cross_entropy_terms.hpp"
#include "free_transformer/detail/kernels/cross_entropy_of_tensors.hpp"
#include "free_transformer/detail/kernels/large_pages.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/plain/cross_entropy.hpp"
#include "free_transformer/detail/plain/row_blocks.hpp"

namespace free_transformer::detail {

struct CrossEntropyState : torch::CustomClassHolder {
  CrossEntropyTerms terms;
  at::Tensor likelihood_scale, z_scale;  ///< 0-dim, in the widest type: factors of every position's loss
  plain::PivotedRows rows;               ///< undefined if the kernels did the work
  at::Tensor gradient;                   ///< what forward has finished, until backward hands it out
};

/// A copy that the caller cannot change under the graph. Class probabilities are too large for one: they are watched.
inline CrossEntropyTerms kept_terms(CrossEntropyTerms terms) {
  if (!terms.has_probabilities()) terms.targets = terms.targets.clone();
  if (terms.token_weight.defined()) terms.token_weight = terms.token_weight.clone();
  if (terms.class_weight.defined()) terms.class_weight = terms.class_weight.clone();
  return terms;
}

struct CrossEntropyResult {
  at::Tensor loss;
  at::Tensor sums;  ///< see `ReconstructionSum`
};

inline CrossEntropyResult plain_cross_entropy_forward(const at::Tensor& logits, const Normalization& normalization,
                                                      bool count_hits, CrossEntropyState& state) {
  const auto type = arithmetic_type(logits.scalar_type());
  const auto& terms = state.terms;
  const auto positions = plain::cross_entropy_positions(terms, logits.size(-1), type);
  state.rows = plain::cross_entropy_rows(logits, terms, positions);
  const auto losses = plain::cross_entropy_losses(state.rows, terms, positions);
  const at::Tensor sums = plain::reconstruction_sums(state.rows, losses, terms, positions, count_hits);
  const auto scales = plain::loss_scales(positions, normalization);
  state.likelihood_scale = scales.likelihood;
  state.z_scale = scales.z;
  if (normalization.reduction == ReductionKind::none) {
    return {losses.sum().reshape(shape_of_positions(logits)), sums};
  }
  return {plain::reduced_loss(sums, normalization).to(type), sums};
}

/// `gradient` is where the gradient goes, if it is defined: fresh memory, or the logits themselves.
inline CrossEntropyResult kernel_cross_entropy_forward(const at::Tensor& logits, const Normalization& normalization,
                                                       bool count_hits, const at::Tensor& gradient,
                                                       CrossEntropyState& state) {
  const auto options = logits.options().dtype(arithmetic_type(logits.scalar_type()));
  const auto scales =
      kernels::cross_entropy_scales(state.terms, normalization, c10::typeMetaToScalarType(options.dtype()));
  const bool for_each = normalization.reduction == ReductionKind::none;
  const auto rows = kernels::cross_entropy_rows(logits, state.terms, scales, gradient, /*upstream=*/{}, count_hits);
  const at::Tensor sums = kernels::reconstruction_sums(rows, state.terms, scales);
  state.likelihood_scale = at::scalar_tensor(scales.likelihood, sums.options());
  state.z_scale = at::scalar_tensor(scales.z, sums.options());
  if (for_each) return {kernels::cross_entropy_losses(rows, state.terms).reshape(shape_of_positions(logits)), sums};
  const double* sum = sums.data_ptr<double>();
  return {at::scalar_tensor(sum[likelihood_loss_sum] * scales.likelihood + sum[z_loss_sum] * scales.z, options), sums};
}

inline CrossEntropyResult cross_entropy_forward(const at::Tensor& logits, const Normalization& normalization,
                                                bool count_hits, bool needs_gradient, CrossEntropyState& state) {
  if (!kernels::takes_cross_entropy(logits, state.terms)) {
    return plain_cross_entropy_forward(logits, normalization, count_hits, state);
  }
  if (needs_gradient && normalization.reduction != ReductionKind::none) {
    state.gradient = kernels::empty_on_large_pages(logits.sizes(), logits.options());
  }
  return kernel_cross_entropy_forward(logits, normalization, count_hits, state.gradient, state);
}

/// The gradient for `upstream`, 0-dim or [N] in the type of arithmetic, by the kernels into given memory.
inline void write_cross_entropy_gradient(const at::Tensor& logits, const CrossEntropyState& state,
                                         const at::Tensor& upstream, const at::Tensor& gradient) {
  const kernels::CrossEntropyScales scales{host_value(state.likelihood_scale), host_value(state.z_scale)};
  kernels::cross_entropy_rows(logits, state.terms, scales, gradient,
                              upstream.expand({state.terms.targets.size(0)}).contiguous(), /*predict=*/false);
}

/// The same in fresh memory, or what forward has finished; without a graph.
inline at::Tensor cross_entropy_gradient(const at::Tensor& logits, CrossEntropyState& state,
                                         const at::Tensor& upstream) {
  const at::NoGradGuard no_grad;
  if (state.gradient.defined()) {
    const at::Tensor gradient = std::exchange(state.gradient, at::Tensor());
    if (host_value(upstream) == 1) return gradient;
    // A half gradient has been rounded, small ones to nothing: a loss scale comes before that or not at all.
    if (gradient.scalar_type() == upstream.scalar_type()) return gradient.mul_(upstream);
  }
  if (state.rows.nll.defined()) {
    const auto positions = plain::cross_entropy_positions(state.terms, logits.size(-1), upstream.scalar_type());
    return plain::cross_entropy_gradient(logits, state.terms, positions, state.rows,
                                         upstream * state.likelihood_scale.to(upstream.scalar_type()),
                                         upstream * state.z_scale.to(upstream.scalar_type()));
  }
  const at::Tensor gradient = kernels::empty_on_large_pages(logits.sizes(), logits.options());
  write_cross_entropy_gradient(logits, state, upstream, gradient);
  return gradient;
}

/// The gradient; while a graph of it is built (create_graph), it has the derivative of a differentiable expression.
inline at::Tensor cross_entropy_backward(const at::Tensor& logits, CrossEntropyState& state,
                                         const at::Tensor& upstream) {
  const auto type = arithmetic_type(logits.scalar_type());
  const at::Tensor flat = upstream.dim() == 0 ? upstream.to(type) : upstream.reshape({-1}).to(type);
  const at::Tensor gradient = cross_entropy_gradient(logits, state, flat);
  if (!at::GradMode::is_enabled()) return gradient;
  const auto positions = plain::cross_entropy_positions(state.terms, logits.size(-1), type);
  const at::Tensor expression = plain::differentiable_cross_entropy_gradient(
      logits, state.terms, positions, flat * state.likelihood_scale.to(type), flat * state.z_scale.to(type));
  return gradient + (expression - expression.detach());
}

struct CrossEntropyFunction : torch::autograd::Function<CrossEntropyFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& logits,
                            const CrossEntropyTerms& terms, const Normalization& normalization, bool count_hits,
                            at::Tensor* sums) {
    auto state = c10::make_intrusive<CrossEntropyState>();
    state->terms = kept_terms(terms);
    CrossEntropyResult result =
        cross_entropy_forward(logits, normalization, count_hits, /*needs_gradient=*/true, *state);
    *sums = std::move(result.sums);
    context->save_for_backward({logits, terms.has_probabilities() ? terms.targets : at::Tensor()});
    context->saved_data["state"] = c10::IValue::make_capsule(std::move(state));
    return result.loss;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& upstream) {
    const at::Tensor logits = context->get_saved_variables()[0];
    const auto capsule = context->saved_data["state"].toCapsule();
    return {cross_entropy_backward(logits, static_cast<CrossEntropyState&>(*capsule), upstream[0]), {}, {}, {}, {}};
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
  return cross_entropy_forward(logits, normalization, count_hits, /*needs_gradient=*/false, state);
}

/// What a forward pass says of each position, [N], without a graph.
struct CrossEntropyValues {
  at::Tensor loss, nll, log_sum_exp, prediction, hit;
};

inline CrossEntropyValues cross_entropy_values(const CrossEntropyRows& rows, const CrossEntropyTerms& terms,
                                               const plain::CrossEntropyPositions& positions) {
  return {plain::cross_entropy_losses(rows, terms, positions).sum(), rows.nll, rows.log_sum_exp, rows.prediction,
          plain::hits(rows, terms, positions)};
}

inline CrossEntropyValues cross_entropy_values(const at::Tensor& logits, const CrossEntropyTerms& terms) {
  const auto positions = plain::cross_entropy_positions(terms, logits.size(-1), arithmetic_type(logits.scalar_type()));
  if (kernels::takes_cross_entropy(logits, terms)) {
    return cross_entropy_values(kernels::cross_entropy_rows(logits, terms, {}, /*gradient=*/{}, /*upstream=*/{},
                                                            /*predict=*/true),
                                terms, positions);
  }
  return cross_entropy_values(plain::cross_entropy_rows(logits, terms, positions), terms, positions);
}

}  // namespace free_transformer::detail
