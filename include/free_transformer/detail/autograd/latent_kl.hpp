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

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/latent_kl.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/optional_tensor.hpp"
#include "free_transformer/detail/plain/latent_kl.hpp"
#include "free_transformer/detail/plain/row_blocks.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

struct LatentResult {
  at::Tensor loss;
  at::Tensor sums;  ///< see `LatentSum`
};

/// What forward leaves for backward.
struct LatentPass {
  LatentSettings settings;
  Normalization normalization;
  at::Tensor scale;     ///< 0-dim, what every penalty is multiplied by
  at::Tensor mean_kl;   ///< 0-dim, of the batch
  at::Tensor gradient;  ///< what forward has finished, until backward hands it out
  bool by_kernel = false;

  /// All tensors but the gradient, for the graph to keep; `restore` puts them back.
  torch::autograd::variable_list tensors() const {
    return {settings.token_weight, settings.prior_logits, scale, mean_kl};
  }
  void restore(const at::Tensor* saved) {
    for (at::Tensor* tensor : {&settings.token_weight, &settings.prior_logits, &scale, &mean_kl}) *tensor = *saved++;
  }
};

template <typename FreeBits>
LatentResult kernel_latent_kl_forward(const at::Tensor& z_logits, bool needs_gradient, LatentPass& pass) {
  const bool for_each = pass.normalization.reduction == ReductionKind::none;
  const double weight = kernels::latent_weight(z_logits, pass.settings);
  const double scale = loss_scale(pass.normalization, weight, weight);
  auto rows = kernels::latent_rows(*kernels::hinge_of<FreeBits>, z_logits, pass.settings, scale, /*upstream=*/{},
                                   /*wants_penalty=*/for_each, needs_gradient && !for_each);
  pass.by_kernel = true;
  pass.gradient = rows.gradient;
  pass.scale = at::scalar_tensor(scale, rows.sums.options());
  pass.mean_kl = at::scalar_tensor(kernels::mean_kl(rows), rows.sums.options());
  if (for_each) return {rows.penalty.reshape(shape_of_positions(z_logits)), rows.sums};
  const double loss = rows.sums.template data_ptr<double>()[penalty_sum] * scale;
  return {at::scalar_tensor(loss, z_logits.options().dtype(at::kFloat)), rows.sums};
}

template <typename FreeBits>
LatentResult plain_latent_kl_forward(const at::Tensor& z_logits, LatentPass& pass) {
  const auto positions = plain::latent_positions(z_logits, pass.settings);
  const bool for_each = pass.normalization.reduction == ReductionKind::none;
  auto losses = plain::latent_losses<FreeBits>(z_logits, pass.settings, positions, for_each);
  pass.mean_kl = losses.mean_kl;
  const at::Tensor weight = losses.sums[latent_weight_sum];
  pass.scale = loss_scale(pass.normalization, weight, weight);
  const at::Tensor loss =
      for_each ? losses.penalty.reshape(shape_of_positions(z_logits)) : losses.sums[penalty_sum] * pass.scale;
  return {loss.to(arithmetic_type(z_logits.scalar_type())), losses.sums};
}

template <typename FreeBits>
LatentResult latent_kl_forward(const at::Tensor& z_logits, bool needs_gradient, LatentPass& pass) {
  if constexpr (kernels::hinge_of<FreeBits>.has_value()) {
    if (kernels::takes_latent_kl(z_logits, pass.settings)) {
      return kernel_latent_kl_forward<FreeBits>(z_logits, needs_gradient, pass);
    }
  }
  return plain_latent_kl_forward<FreeBits>(z_logits, pass);
}

/// The gradients to z_logits and the prior's logits for `upstream`, 0-dim or [N] in the widest type, without a graph.
template <typename FreeBits>
plain::LatentGradients latent_kl_gradients(const at::Tensor& z_logits, LatentPass& pass, const at::Tensor& upstream) {
  if constexpr (kernels::hinge_of<FreeBits>.has_value()) {
    if (pass.gradient.defined()) {
      const at::Tensor gradient = std::exchange(pass.gradient, at::Tensor());
      if (is_one(host_value(upstream))) return {gradient, {}};
      if (gradient.scalar_type() == at::kFloat) return {gradient.mul_(upstream), {}};  // a half one was rounded: anew
    }
    if (pass.by_kernel) {
      const at::Tensor for_each = upstream.expand({z_logits.numel() / z_logits.size(-1)}).contiguous();
      return {
          kernels::latent_rows(*kernels::hinge_of<FreeBits>, z_logits, pass.settings, host_value(pass.scale), for_each,
                               /*wants_penalty=*/false, /*wants_gradient=*/true)
              .gradient,
          {}};
    }
  }
  return plain::latent_gradients<FreeBits>(z_logits, pass.settings, plain::latent_positions(z_logits, pass.settings),
                                           pass.mean_kl, upstream * pass.scale);
}

/// The gradients of the differentiable loss, themselves with a graph. They are taken to aliases of the inputs: upstream
/// may depend on the inputs, too, and that way is the engine's to go. None for an input that no longer requires one.
template <typename FreeBits>
plain::LatentGradients latent_kl_gradients_with_graph(const at::Tensor& z_logits, const LatentPass& pass,
                                                      const at::Tensor& upstream) {
  const auto alias = [](const at::Tensor& input) { return input.defined() ? input.view_as(input) : input; };
  const at::Tensor z = alias(z_logits);
  LatentSettings settings = pass.settings;
  settings.prior_logits = alias(settings.prior_logits);
  torch::autograd::variable_list inputs;
  for (const at::Tensor& input : {z, settings.prior_logits}) {
    if (input.defined() && input.requires_grad()) inputs.push_back(input);
  }
  if (inputs.empty()) return {};
  const at::Tensor loss = plain::differentiable_latent_loss<FreeBits>(
      z, settings, plain::latent_positions(z_logits, settings), pass.mean_kl, upstream * pass.scale);
  const auto gradients = torch::autograd::grad({loss}, inputs, /*grad_outputs=*/{}, /*retain_graph=*/true,
                                               /*create_graph=*/true);
  plain::LatentGradients of_inputs;
  if (z.requires_grad()) of_inputs.z_logits = gradients.front();
  if (inputs.size() == 2 || !z.requires_grad()) of_inputs.prior_logits = gradients.back();
  return of_inputs;
}

/// A pass that a node of the graph holds. Its tensors are saved variables of the node, which releases those.
struct HeldLatentPass : torch::CustomClassHolder {
  LatentPass pass;
};

template <typename FreeBits>
struct LatentKLFunction : torch::autograd::Function<LatentKLFunction<FreeBits>> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& z_logits,
                            const OptionalTensor& prior_logits, const LatentSettings& settings,
                            const Normalization& normalization, at::Tensor* sums) {
    auto held = c10::make_intrusive<HeldLatentPass>();
    LatentPass& pass = held->pass;
    pass.settings = settings;
    pass.settings.prior_logits = prior_logits.value_or(at::Tensor());
    if (settings.token_weight.defined()) pass.settings.token_weight = settings.token_weight.clone();
    pass.normalization = normalization;
    LatentResult result = latent_kl_forward<FreeBits>(z_logits, /*needs_gradient=*/true, pass);
    *sums = std::move(result.sums);
    auto saved = pass.tensors();
    saved.push_back(z_logits);
    context->save_for_backward(std::move(saved));
    pass.restore(torch::autograd::variable_list(pass.tensors().size()).data());
    pass.normalization.tensor.reset();
    context->saved_data["pass"] = c10::IValue::make_capsule(std::move(held));
    return result.loss;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& upstream) {
    const auto saved = context->get_saved_variables();
    const auto capsule = context->saved_data["pass"].toCapsule();
    auto& held = static_cast<HeldLatentPass&>(*capsule).pass;
    LatentPass pass = held;
    pass.restore(saved.data());
    const at::Tensor wide = upstream[0].to(pass.scale.scalar_type());
    const at::Tensor flat = wide.dim() == 0 ? wide : wide.reshape({-1});
    plain::LatentGradients gradients;
    if (at::GradMode::is_enabled()) {
      gradients = latent_kl_gradients_with_graph<FreeBits>(saved.back(), pass, flat);
    } else {
      held.gradient.reset();
      gradients = latent_kl_gradients<FreeBits>(saved.back(), pass, flat);
    }
    return {gradients.z_logits, gradients.prior_logits, {}, {}, {}};
  }
};

template <typename FreeBits>
LatentResult latent_kl(const at::Tensor& z_logits, const LatentSettings& settings, const Normalization& normalization) {
  const at::Tensor& prior_logits = settings.prior_logits;
  const bool needs_gradient = z_logits.requires_grad() || (prior_logits.defined() && prior_logits.requires_grad());
  if (at::GradMode::is_enabled() && needs_gradient) {
    LatentResult result;
    result.loss = LatentKLFunction<FreeBits>::apply(z_logits, optional_tensor(prior_logits), settings, normalization,
                                                    &result.sums);
    return result;
  }
  const at::NoGradGuard no_grad;
  LatentPass pass;
  pass.settings = settings;
  pass.normalization = normalization;
  return latent_kl_forward<FreeBits>(z_logits, /*needs_gradient=*/false, pass);
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
