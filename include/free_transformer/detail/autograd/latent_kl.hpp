/// The free-bits KL as a node of the graph: by the vector kernels where they can, else in LibTorch operations.
///
/// The kernels finish the gradient in the forward pass; backward hands it out, times what comes from upstream. Saved
/// for backward: the latent logits, those of the prior, the weights, and that gradient. A second backward computes it
/// anew.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <utility>

#include "free_transformer/detail/kernels/latent_kl_of_tensors.hpp"
#include "free_transformer/detail/latent_terms.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/optional_tensor.hpp"
#include "free_transformer/detail/plain/latent_kl.hpp"
#include "free_transformer/detail/plain/row_blocks.hpp"

namespace free_transformer::detail {

struct LatentState : torch::CustomClassHolder {
  LatentTerms terms;
  Normalization normalization;
  at::Tensor scale;     ///< 0-dim, what every penalty is multiplied by
  at::Tensor mean_kl;   ///< 0-dim, of the batch
  at::Tensor gradient;  ///< what forward has finished, until backward hands it out
  bool by_kernel = false;
};

struct LatentResult {
  at::Tensor loss;
  at::Tensor sums;  ///< see `LatentSum`
};

template <typename FreeBits>
LatentResult kernel_latent_kl_forward(const at::Tensor& z_logits, bool needs_gradient, LatentState& state) {
  const bool for_each = state.normalization.reduction == ReductionKind::none;
  const double scale = loss_scale(state.normalization, kernels::latent_weight(z_logits, state.terms));
  auto rows = kernels::latent_rows(*kernels::hinge_of<FreeBits>, z_logits, state.terms, scale, /*upstream=*/{},
                                   /*wants_penalty=*/for_each, needs_gradient && !for_each);
  state.by_kernel = true;
  state.gradient = rows.gradient;
  state.scale = at::scalar_tensor(scale, rows.sums.options());
  state.mean_kl = at::scalar_tensor(kernels::mean_kl(rows), rows.sums.options());
  if (for_each) return {rows.penalty.reshape(shape_of_positions(z_logits)), rows.sums};
  const double loss = rows.sums.template data_ptr<double>()[penalty_sum] * scale;
  return {at::scalar_tensor(loss, z_logits.options().dtype(at::kFloat)), rows.sums};
}

template <typename FreeBits>
LatentResult plain_latent_kl_forward(const at::Tensor& z_logits, const at::Tensor& prior_logits, LatentState& state) {
  const auto positions = plain::latent_positions(z_logits, state.terms);
  auto losses = plain::latent_losses<FreeBits>(z_logits, prior_logits, state.terms, positions,
                                               state.normalization.reduction == ReductionKind::none);
  state.mean_kl = losses.mean_kl;
  state.scale = loss_scale(state.normalization, losses.sums[latent_weight_sum]);
  const at::Tensor loss = state.normalization.reduction == ReductionKind::none
                              ? losses.penalty.reshape(shape_of_positions(z_logits))
                              : losses.sums[penalty_sum] * state.scale;
  return {loss.to(arithmetic_type(z_logits.scalar_type())), losses.sums};
}

template <typename FreeBits>
LatentResult latent_kl_forward(const at::Tensor& z_logits, const at::Tensor& prior_logits, bool needs_gradient,
                               LatentState& state) {
  if constexpr (kernels::hinge_of<FreeBits>.has_value()) {
    if (kernels::takes_latent_kl(z_logits, prior_logits)) {
      return kernel_latent_kl_forward<FreeBits>(z_logits, needs_gradient, state);
    }
  }
  return plain_latent_kl_forward<FreeBits>(z_logits, prior_logits, state);
}

/// The gradients to z_logits and prior_logits for `upstream`, 0-dim or [N] in the widest type, without a graph.
template <typename FreeBits>
plain::LatentGradients latent_kl_gradients(const at::Tensor& z_logits, const at::Tensor& prior_logits,
                                           LatentState& state, const at::Tensor& upstream) {
  if constexpr (kernels::hinge_of<FreeBits>.has_value()) {
    if (state.gradient.defined()) {
      const at::Tensor gradient = std::exchange(state.gradient, at::Tensor());
      if (host_value(upstream) == 1) return {gradient, {}};
      if (gradient.scalar_type() == at::kFloat) return {gradient.mul_(upstream), {}};  // a half one was rounded: anew
    }
    if (state.by_kernel) {
      const at::Tensor for_each = upstream.expand({z_logits.numel() / z_logits.size(-1)}).contiguous();
      return {
          kernels::latent_rows(*kernels::hinge_of<FreeBits>, z_logits, state.terms, host_value(state.scale), for_each,
                               /*wants_penalty=*/false, /*wants_gradient=*/true)
              .gradient,
          {}};
    }
  }
  return plain::latent_gradients<FreeBits>(z_logits, prior_logits, state.terms,
                                           plain::latent_positions(z_logits, state.terms), state.mean_kl,
                                           upstream * state.scale);
}

template <typename FreeBits>
struct LatentKLFunction : torch::autograd::Function<LatentKLFunction<FreeBits>> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& z_logits,
                            const OptionalTensor& optional_prior, const LatentTerms& terms,
                            const Normalization& normalization, at::Tensor* sums) {
    const at::Tensor prior_logits = optional_prior.value_or(at::Tensor());
    auto state = c10::make_intrusive<LatentState>();
    state->terms = terms;
    if (terms.token_weight.defined()) state->terms.token_weight = terms.token_weight.clone();
    state->normalization = normalization;
    LatentResult result = latent_kl_forward<FreeBits>(z_logits, prior_logits, /*needs_gradient=*/true, *state);
    *sums = std::move(result.sums);
    context->save_for_backward({z_logits, prior_logits});
    context->saved_data["state"] = c10::IValue::make_capsule(std::move(state));
    return result.loss;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& upstream) {
    const auto saved = context->get_saved_variables();
    const at::Tensor &z_logits = saved[0], &prior_logits = saved[1];
    const auto capsule = context->saved_data["state"].toCapsule();
    auto& state = static_cast<LatentState&>(*capsule);
    const at::Tensor wide = upstream[0].to(state.scale.scalar_type());
    const at::Tensor flat = wide.dim() == 0 ? wide : wide.reshape({-1});
    if (!at::GradMode::is_enabled()) {
      auto gradients = latent_kl_gradients<FreeBits>(z_logits, prior_logits, state, flat);
      return {gradients.z_logits, gradients.prior_logits, {}, {}, {}};
    }
    return gradients_with_graph(z_logits, prior_logits, state, flat);
  }

 private:
  /// The gradients of the differentiable loss, themselves with a graph. They are taken to aliases of the inputs:
  /// upstream may depend on the inputs, too, and that way is the engine's to go.
  static torch::autograd::variable_list gradients_with_graph(const at::Tensor& z_logits, const at::Tensor& prior_logits,
                                                             const LatentState& state, const at::Tensor& upstream) {
    const auto alias = [](const at::Tensor& input) { return input.defined() ? input.view_as(input) : input; };
    const at::Tensor z = alias(z_logits), prior = alias(prior_logits);
    const at::Tensor loss = plain::differentiable_latent_loss<FreeBits>(
        z, prior, state.terms, plain::latent_positions(z_logits, state.terms), state.mean_kl, upstream * state.scale);
    torch::autograd::variable_list inputs;
    for (const at::Tensor& input : {z, prior}) {
      if (input.defined() && input.requires_grad()) inputs.push_back(input);
    }
    const auto gradients = torch::autograd::grad({loss}, inputs, /*grad_outputs=*/{}, /*retain_graph=*/true,
                                                 /*create_graph=*/true);
    torch::autograd::variable_list of_arguments(5);
    if (z.requires_grad()) of_arguments[0] = gradients.front();
    if (prior.defined() && prior.requires_grad()) of_arguments[1] = gradients.back();
    return of_arguments;
  }
};

template <typename FreeBits>
LatentResult latent_kl(const at::Tensor& z_logits, const at::Tensor& prior_logits, const LatentTerms& terms,
                       const Normalization& normalization) {
  const bool needs_gradient = z_logits.requires_grad() || (prior_logits.defined() && prior_logits.requires_grad());
  if (at::GradMode::is_enabled() && needs_gradient) {
    LatentResult result;
    result.loss =
        LatentKLFunction<FreeBits>::apply(z_logits, optional_tensor(prior_logits), terms, normalization, &result.sums);
    return result;
  }
  const at::NoGradGuard no_grad;
  LatentState state;
  state.terms = terms;
  state.normalization = normalization;
  return latent_kl_forward<FreeBits>(z_logits, prior_logits, /*needs_gradient=*/false, state);
}

}  // namespace free_transformer::detail
