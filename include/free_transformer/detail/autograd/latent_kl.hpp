/// The free-bits KL as a node of the graph.
///
/// The gradients are finished in the forward pass; backward hands them out, times what comes from upstream. Saved for
/// backward: the latent logits, those of the prior, the weights, and those gradients. A second backward computes them
/// anew, as does the first with a gradient of its own for each position (kNone), and for half types on other devices
/// than the CPU. LibTorch's operations there leave the scale to backward.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/autograd.h>

#include <utility>
#include <vector>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/autograd/loss_node.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/latent_kl.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/positions.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

template <typename FreeBits>
class LatentPass final : public LossPass {
 public:
  LatentPass(const LatentSettings& settings, const Normalization& normalization, bool wants_metrics)
      : settings_(settings), normalization_(normalization), wants_metrics_(wants_metrics) {
    settings_.prior_logits.reset();  // it comes as an input
  }

  LossAndSums forward(const Tensors& inputs, bool needs_gradient) override {
    const at::Tensor& z_logits = inputs[0];
    const auto type = arithmetic_type(z_logits.scalar_type());
    const bool for_each = normalization_.reduction == ReductionKind::none;
    if (needs_gradient && settings_.token_weight.defined()) settings_.token_weight = settings_.token_weight.clone();
    const LatentSettings settings = with_prior(inputs[1]);
    auto wanted =
        wanted_gradients(inputs, needs_gradient && !for_each && (z_logits.device().is_cpu() || !is_rounded(inputs)));
    wanted.penalty = for_each;
    wanted.metrics = wants_metrics_;
    wanted.unscaled_gradient = needs_gradient && !for_each && !z_logits.device().is_cpu() && z_logits.requires_grad();
    LatentRows rows = latent_rows<FreeBits>(z_logits, settings, normalization_, /*scale=*/{}, /*upstream=*/{}, wanted);
    normalization_.tensor.reset();
    scale_ = rows.scale;
    gradients_ = {std::move(rows.gradient), std::move(rows.prior_gradient)};
    unscaled_gradient_ = std::move(rows.unscaled_gradient);
    sums_ = rows.sums;
    if (for_each) return {rows.penalty.reshape(shape_of_positions(z_logits)), rows.sums};
    return {reduced_loss(rows, type), rows.sums};
  }

  Tensors backward(const Tensors& inputs, const at::Tensor& upstream) override {
    const at::Tensor unscaled = std::exchange(unscaled_gradient_, at::Tensor());
    if (unscaled.defined() && !at::GradMode::is_enabled()) {
      return {plain::scaled_gradient(unscaled, upstream * scale_, inputs[0]), at::Tensor()};
    }
    const at::Tensor wide = upstream.to(scale_.scalar_type());
    const at::Tensor flat = wide.dim() == 0 ? wide : wide.reshape({-1});
    if (at::GradMode::is_enabled()) return gradients_with_graph(inputs, flat);
    Tensors finished = std::exchange(gradients_, Tensors());
    if (!finished.empty() && (finished[0].defined() || finished[1].defined())) {
      if (is_one_on_host(flat)) return finished;
      if (!is_rounded(inputs) && keeps_zeros(flat)) {  // a half one was rounded: anew
        for (const at::Tensor& gradient : finished) {
          if (gradient.defined()) gradient.mul_(flat);
        }
        return finished;
      }
    }
    const int64_t rows = inputs[0].numel() / inputs[0].size(-1);
    LatentRows anew = latent_rows<FreeBits>(inputs[0], with_prior(inputs[1]), normalization_, scale_,
                                            flat.expand({rows}), wanted_gradients(inputs, true));
    return {std::move(anew.gradient), std::move(anew.prior_gradient)};
  }

  std::vector<at::Tensor*> saved_tensors() override { return {&settings_.token_weight, &scale_, &sums_}; }

 private:
  static bool is_rounded(const Tensors& inputs) {
    const auto is_half = [](const at::Tensor& input) {
      return input.defined() && arithmetic_type(input.scalar_type()) != input.scalar_type();
    };
    return is_half(inputs[0]) || is_half(inputs[1]);
  }

  static WantedOfLatents wanted_gradients(const Tensors& inputs, bool any) {
    return {/*penalty=*/false, any && inputs[0].requires_grad(),
            any && inputs[1].defined() && inputs[1].requires_grad()};
  }

  LatentSettings with_prior(const at::Tensor& prior_logits) const {
    LatentSettings settings = settings_;
    settings.prior_logits = prior_logits;
    return settings;
  }

  /// The gradients of the differentiable loss, themselves with a graph. They are taken to aliases of the inputs: upstream
  /// may depend on the inputs, too, and that way is the engine's to go. None for an input that no longer requires one.
  Tensors gradients_with_graph(const Tensors& inputs, const at::Tensor& upstream) const {
    Tensors aliases(2), wanted, gradients(2);
    for (size_t index = 0; index < aliases.size(); ++index) {
      if (!inputs[index].defined()) continue;
      aliases[index] = inputs[index].view_as(inputs[index]);
      if (aliases[index].requires_grad()) wanted.push_back(aliases[index]);
    }
    if (wanted.empty()) return gradients;
    const at::Tensor loss = plain::differentiable_latent_loss<FreeBits>(aliases[0], with_prior(aliases[1]),
                                                                        plain::mean_kl(sums_), upstream * scale_);
    auto found =
        torch::autograd::grad({loss}, wanted, /*grad_outputs=*/{}, /*retain_graph=*/true, /*create_graph=*/true);
    for (size_t index = aliases.size(); index-- > 0;) {
      if (!aliases[index].defined() || !aliases[index].requires_grad()) continue;
      gradients[index] = std::move(found.back());
      found.pop_back();
    }
    return gradients;
  }

  LatentSettings settings_;
  Normalization normalization_;
  bool wants_metrics_;
  at::Tensor scale_, sums_;
  Tensors gradients_;  ///< what forward has finished, until backward hands it out
  at::Tensor unscaled_gradient_;
};

template <typename FreeBits>
LossAndSums latent_kl(const at::Tensor& z_logits, const LatentSettings& settings, const Normalization& normalization,
                      bool wants_metrics) {
  return run(c10::make_intrusive<LatentPass<FreeBits>>(settings, normalization, wants_metrics),
             {z_logits, settings.prior_logits});
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
