/// Cross entropy as a node of the graph: by the vector kernels where they can, else in LibTorch operations.
///
/// The kernels finish the gradient in the forward pass, while a row is in the cache; backward hands it out, times what
/// comes from upstream. Saved then: the logits and their gradient. A second backward computes it anew. In LibTorch
/// operations, or with a gradient of its own for each position (kNone), backward computes the gradient; saved: the
/// logits, five numbers a position. All saved tensors are released by a backward that does not retain the graph.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <utility>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/cross_entropy.hpp"
#include "free_transformer/detail/kernels/vector/large_pages.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/numbers.hpp"
#include "free_transformer/detail/plain/cross_entropy.hpp"
#include "free_transformer/detail/plain/row_blocks.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

struct CrossEntropyResult {
  at::Tensor loss;
  at::Tensor sums;  ///< see `ReconstructionSum`
};

/// What forward leaves for backward.
struct CrossEntropyPass {
  CrossEntropySettings settings;
  plain::LossScales scales;  ///< factors of every position's loss
  plain::PivotedRows rows;   ///< undefined if the kernels did the work
  at::Tensor gradient;       ///< what forward has finished, until backward hands it out

  /// All tensors but the gradient, for the graph to keep; `restore` puts them back.
  torch::autograd::variable_list tensors() const {
    return {settings.targets, settings.token_weight, settings.class_weight, scales.likelihood, scales.z,
            rows.log_sum_exp, rows.maximum,          rows.others,           rows.prediction};
  }
  void restore(const at::Tensor* saved) {
    for (at::Tensor* tensor : {&settings.targets, &settings.token_weight, &settings.class_weight, &scales.likelihood,
                               &scales.z, &rows.log_sum_exp, &rows.maximum, &rows.others, &rows.prediction}) {
      *tensor = *saved++;
    }
  }
  void release() {
    rows = plain::PivotedRows();
    restore(torch::autograd::variable_list(tensors().size()).data());
  }
};

/// A copy that the caller cannot change under the graph. Class probabilities are too large for one: they are watched.
inline CrossEntropySettings kept_settings(CrossEntropySettings settings) {
  if (!settings.has_probabilities()) settings.targets = settings.targets.clone();
  if (settings.token_weight.defined()) settings.token_weight = settings.token_weight.clone();
  if (settings.class_weight.defined()) settings.class_weight = settings.class_weight.clone();
  return settings;
}

inline CrossEntropyResult plain_cross_entropy_forward(const at::Tensor& logits, const Normalization& normalization,
                                                      bool count_hits, CrossEntropyPass& pass) {
  const auto type = arithmetic_type(logits.scalar_type());
  const auto& settings = pass.settings;
  const auto positions = plain::cross_entropy_positions(settings, logits.size(-1), type);
  pass.rows = plain::cross_entropy_rows(logits, settings, positions, /*with_entropy=*/false);
  const auto losses = plain::cross_entropy_losses(pass.rows, settings, positions);
  const at::Tensor sums = plain::reconstruction_sums(pass.rows, losses, settings, positions, count_hits);
  pass.scales = plain::loss_scales(positions, normalization);
  if (normalization.reduction == ReductionKind::none) {
    return {losses.sum().reshape(shape_of_positions(logits)), sums};
  }
  return {plain::reduced_loss(sums, normalization).to(type), sums};
}

/// `gradient` is where the gradient goes, if it is defined: fresh memory, or the logits themselves.
inline CrossEntropyResult kernel_cross_entropy_forward(const at::Tensor& logits, const Normalization& normalization,
                                                       bool count_hits, const at::Tensor& gradient,
                                                       CrossEntropyPass& pass) {
  const bool for_each = normalization.reduction == ReductionKind::none;
  const auto scales = kernels::cross_entropy_scales(pass.settings, normalization);
  const auto of_rows = kernels::cross_entropy_rows(logits, pass.settings, scales, gradient, /*upstream=*/{},
                                                   {for_each, /*prediction=*/count_hits, /*entropy=*/false});
  const at::Tensor& sums = of_rows.sums;
  pass.scales = {at::scalar_tensor(scales.likelihood, sums.options()), at::scalar_tensor(scales.z, sums.options())};
  if (for_each) {
    return {kernels::cross_entropy_losses(of_rows.rows, pass.settings).reshape(shape_of_positions(logits)), sums};
  }
  const double* sum = sums.data_ptr<double>();
  const double loss = sum[likelihood_loss_sum] * scales.likelihood + sum[z_loss_sum] * scales.z;
  return {at::scalar_tensor(loss, logits.options().dtype(at::kFloat)), sums};
}

inline CrossEntropyResult cross_entropy_forward(const at::Tensor& logits, const Normalization& normalization,
                                                bool count_hits, bool needs_gradient, CrossEntropyPass& pass) {
  if (!kernels::takes_cross_entropy(logits, pass.settings)) {
    return plain_cross_entropy_forward(logits, normalization, count_hits, pass);
  }
  if (needs_gradient && normalization.reduction != ReductionKind::none) {
    pass.gradient = kernels::empty_on_large_pages(logits.sizes(), logits.options());
  }
  return kernel_cross_entropy_forward(logits, normalization, count_hits, pass.gradient, pass);
}

/// The gradient for `upstream`, 0-dim or [N] in the type of arithmetic, by the kernels into given memory.
inline void write_cross_entropy_gradient(const at::Tensor& logits, const CrossEntropyPass& pass,
                                         const at::Tensor& upstream, const at::Tensor& gradient) {
  const kernels::CrossEntropyScales scales{host_value(pass.scales.likelihood), host_value(pass.scales.z)};
  kernels::cross_entropy_rows(logits, pass.settings, scales, gradient,
                              upstream.expand({pass.settings.targets.size(0)}).contiguous(), {});
}

/// The same in fresh memory, or what forward has finished; without a graph.
inline at::Tensor cross_entropy_gradient(const at::Tensor& logits, CrossEntropyPass& pass, const at::Tensor& upstream) {
  const at::NoGradGuard no_grad;
  if (pass.gradient.defined()) {
    const at::Tensor gradient = std::exchange(pass.gradient, at::Tensor());
    if (is_one(host_value(upstream))) return gradient;
    // A half gradient has been rounded, small ones to nothing: a loss scale comes before that or not at all.
    if (gradient.scalar_type() == upstream.scalar_type()) return gradient.mul_(upstream);
  }
  if (pass.rows.maximum.defined()) {
    const auto type = upstream.scalar_type();
    const auto positions = plain::cross_entropy_positions(pass.settings, logits.size(-1), type);
    return plain::cross_entropy_gradient(logits, pass.settings, positions, pass.rows,
                                         upstream * pass.scales.likelihood.to(type), upstream * pass.scales.z.to(type));
  }
  const at::Tensor gradient = kernels::empty_on_large_pages(logits.sizes(), logits.options());
  write_cross_entropy_gradient(logits, pass, upstream, gradient);
  return gradient;
}

/// The gradient; while a graph of it is built (create_graph), it has the derivative of a differentiable expression.
inline at::Tensor cross_entropy_backward(const at::Tensor& logits, CrossEntropyPass& pass, const at::Tensor& upstream) {
  const auto type = arithmetic_type(logits.scalar_type());
  const at::Tensor flat = upstream.dim() == 0 ? upstream.to(type) : upstream.reshape({-1}).to(type);
  const at::Tensor gradient = cross_entropy_gradient(logits, pass, flat);
  if (!at::GradMode::is_enabled()) return gradient;
  const auto positions = plain::cross_entropy_positions(pass.settings, logits.size(-1), type);
  const at::Tensor expression = plain::differentiable_cross_entropy_gradient(
      logits, pass.settings, positions, flat * pass.scales.likelihood.to(type), flat * pass.scales.z.to(type));
  return gradient + (expression - expression.detach());
}

/// A pass that a node of the graph holds. Its tensors are saved variables of the node, which releases those.
struct HeldCrossEntropyPass : torch::CustomClassHolder {
  CrossEntropyPass pass;
};

struct CrossEntropyFunction : torch::autograd::Function<CrossEntropyFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& logits,
                            const CrossEntropySettings& settings, const Normalization& normalization, bool count_hits,
                            at::Tensor* sums) {
    auto held = c10::make_intrusive<HeldCrossEntropyPass>();
    held->pass.settings = kept_settings(settings);
    CrossEntropyResult result =
        cross_entropy_forward(logits, normalization, count_hits, /*needs_gradient=*/true, held->pass);
    *sums = std::move(result.sums);
    auto saved = held->pass.tensors();
    saved.push_back(logits);
    context->save_for_backward(std::move(saved));
    held->pass.release();
    context->saved_data["pass"] = c10::IValue::make_capsule(std::move(held));
    return result.loss;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& upstream) {
    const auto saved = context->get_saved_variables();
    const auto capsule = context->saved_data["pass"].toCapsule();
    auto& held = static_cast<HeldCrossEntropyPass&>(*capsule).pass;
    CrossEntropyPass pass = held;
    held.gradient.reset();
    pass.restore(saved.data());
    return {cross_entropy_backward(saved.back(), pass, upstream[0]), {}, {}, {}, {}};
  }
};

inline CrossEntropyResult cross_entropy(const at::Tensor& logits, const CrossEntropySettings& settings,
                                        const Normalization& normalization, bool count_hits) {
  if (at::GradMode::is_enabled() && logits.requires_grad()) {
    CrossEntropyResult result;
    result.loss = CrossEntropyFunction::apply(logits, settings, normalization, count_hits, &result.sums);
    return result;
  }
  const at::NoGradGuard no_grad;
  CrossEntropyPass pass;
  pass.settings = settings;
  return cross_entropy_forward(logits, normalization, count_hits, /*needs_gradient=*/false, pass);
}

/// What a forward pass says of each position, [N], without a graph; the prediction is -1 where a position does not count.
struct CrossEntropyValues {
  at::Tensor loss, nll, log_sum_exp, entropy, prediction, hit;
};

inline CrossEntropyValues cross_entropy_values(const CrossEntropyRows& rows, const CrossEntropySettings& settings,
                                               const plain::CrossEntropyPositions& positions) {
  return {plain::cross_entropy_losses(rows, settings, positions).sum(),
          rows.nll,
          rows.log_sum_exp,
          rows.entropy,
          rows.prediction.masked_fill(~positions.counted, -1),
          plain::hits(rows, settings, positions)};
}

inline CrossEntropyValues cross_entropy_values(const at::Tensor& logits, const CrossEntropySettings& settings) {
  const auto positions =
      plain::cross_entropy_positions(settings, logits.size(-1), arithmetic_type(logits.scalar_type()));
  if (kernels::takes_cross_entropy(logits, settings)) {
    return cross_entropy_values(kernels::cross_entropy_rows(logits, settings, {}, /*gradient=*/{}, /*upstream=*/{},
                                                            {/*each=*/true, /*prediction=*/true, /*entropy=*/true})
                                    .rows,
                                settings, positions);
  }
  return cross_entropy_values(plain::cross_entropy_rows(logits, settings, positions, /*with_entropy=*/true), settings,
                              positions);
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
