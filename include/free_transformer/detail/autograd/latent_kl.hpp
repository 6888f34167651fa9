/// The free-bits KL as a node of the graph. Saved for backward: the latent logits, those of the prior, and the weights.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <utility>

#include "free_transformer/detail/latent_terms.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/plain/latent_kl.hpp"

namespace free_transformer::detail {

struct LatentState : torch::CustomClassHolder {
  LatentTerms terms;
  plain::LatentPositions positions;
  at::Tensor mean_kl;  ///< 0-dim
  at::Tensor scale;    ///< 0-dim, what every penalty is multiplied by
};

struct LatentResult {
  at::Tensor loss;
  at::Tensor sums;
};

template <typename FreeBits>
LatentResult latent_kl_forward(const at::Tensor& z_logits, const at::Tensor& prior_logits,
                               const Normalization& normalization, LatentState& state) {
  state.positions = plain::latent_positions(z_logits, state.terms);
  auto losses = plain::latent_losses<FreeBits>(z_logits, prior_logits, state.terms, state.positions,
                                               normalization.reduction == ReductionKind::none);
  state.mean_kl = losses.mean_kl;
  state.scale = loss_scale(normalization, losses.sums[latent_weight_sum]);
  const auto type = arithmetic_type(z_logits.scalar_type());
  const auto positions_shape = z_logits.sizes().slice(0, static_cast<size_t>(z_logits.dim() - 1));
  const at::Tensor loss = normalization.reduction == ReductionKind::none ? losses.penalty.reshape(positions_shape)
                                                                         : losses.sums[penalty_sum] * state.scale;
  return {loss.to(type), losses.sums};
}

template <typename FreeBits>
struct LatentKLFunction : torch::autograd::Function<LatentKLFunction<FreeBits>> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& z_logits,
                            const plain::OptionalTensor& optional_prior, const LatentTerms& terms,
                            const Normalization& normalization, at::Tensor* sums) {
    const at::Tensor prior_logits = optional_prior.value_or(at::Tensor());
    auto state = c10::make_intrusive<LatentState>();
    state->terms = terms;
    LatentResult result = latent_kl_forward<FreeBits>(z_logits, prior_logits, normalization, *state);
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
    const auto& state = static_cast<const LatentState&>(*capsule);
    const at::Tensor flat = upstream[0].dim() == 0 ? upstream[0] : upstream[0].reshape({-1});
    const at::Tensor scale = flat.to(state.scale.scalar_type()) * state.scale;
    if (!at::GradMode::is_enabled()) {
      auto gradients = plain::latent_gradients<FreeBits>(z_logits, prior_logits, state.terms, state.positions,
                                                         state.mean_kl, scale);
      return {gradients.z_logits, gradients.prior_logits, {}, {}, {}};
    }
    return gradients_with_graph(z_logits, prior_logits, state, flat.to(state.scale.scalar_type()));
  }

 private:
  /// The gradients of the differentiable loss, themselves with a graph. They are taken to aliases of the inputs: upstream may
  /// depend on the inputs, too, and that way is the engine's to go.
  static torch::autograd::variable_list gradients_with_graph(const at::Tensor& z_logits, const at::Tensor& prior_logits,
                                                             const LatentState& state, const at::Tensor& upstream) {
    const auto alias = [](const at::Tensor& input) { return input.defined() ? input.view_as(input) : input; };
    const at::Tensor z = alias(z_logits), prior = alias(prior_logits);
    const at::Tensor loss = plain::differentiable_latent_loss<FreeBits>(
        z, prior, state.terms, state.positions, state.mean_kl, upstream * state.scale);
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
    result.loss = LatentKLFunction<FreeBits>::apply(z_logits, plain::optional_tensor(prior_logits), terms,
                                                    normalization, &result.sums);
    return result;
  }
  const at::NoGradGuard no_grad;
  LatentState state;
  state.terms = terms;
  return latent_kl_forward<FreeBits>(z_logits, prior_logits, normalization, state);
}

}  // namespace free_transformer::detail
