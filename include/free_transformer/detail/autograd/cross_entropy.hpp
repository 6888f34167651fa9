/// Cross entropy of dense logits as a node of the graph.
///
/// The gradient is finished in the forward pass, while a row is in the cache; backward hands it out, times what comes
/// from upstream. Saved then: the logits and their gradient. A second backward computes it anew, as does the first with
/// a gradient of its own for each position (kNone), and on other devices for half types and by the kernels. LibTorch's
/// operations on another device leave its factor to backward, where upstream is part of it.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/intrusive_ptr.h>

#include <utility>
#include <vector>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/autograd/inplace_cross_entropy.hpp"
#include "free_transformer/detail/autograd/loss_node.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/cross_entropy.hpp"
#include "free_transformer/detail/kernels/vector/large_pages.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/numbers.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

class CrossEntropyPass final : public LossPass {
 public:
  CrossEntropyPass(const CrossEntropySettings& settings, const Normalization& normalization, bool count_hits)
      : settings_(settings), normalization_(normalization), count_hits_(count_hits) {}

  LossAndSums forward(const Tensors& inputs, bool needs_gradient) override {
    const at::Tensor& logits = inputs[0];
    const bool wants_gradient = needs_gradient && normalization_.reduction != ReductionKind::none;
    if (wants_gradient && plain::takes_few_operations(logits, settings_, {})) {
      if (!device::takes_cross_entropy(logits, settings_)) return forward_in_few_operations(logits);
    }
    if (needs_gradient) settings_ = kept_settings(std::move(settings_));
    positions_ = cross_entropy_positions(logits, settings_, normalization_);
    if (wants_gradient && finishes_gradient_in_forward(logits, settings_)) {
      gradient_ = kernels::empty_on_large_pages(logits.sizes(), logits.options());
    }
    return cross_entropy_forward(logits, settings_, positions_, normalization_.reduction, count_hits_, gradient_);
  }

  Tensors backward(const Tensors& inputs, const at::Tensor& upstream) override {
    const at::Tensor& logits = inputs[0];
    const auto type = arithmetic_type(logits.scalar_type());
    const at::Tensor flat = upstream.dim() == 0 ? upstream.to(type) : upstream.reshape({-1}).to(type);
    const at::Tensor value = gradient(logits, flat);
    if (!at::GradMode::is_enabled()) return {value};
    const at::Tensor expression = plain::differentiable_cross_entropy_gradient(logits, settings_, positions_, flat);
    return {value + (expression - expression.detach())};
  }

  std::vector<at::Tensor*> saved_tensors() override { return tensors_of(settings_, positions_); }

 private:
  /// The class indices are a copy of the targets already, and all that backward wants of them.
  LossAndSums forward_in_few_operations(const at::Tensor& logits) {
    const auto type = arithmetic_type(logits.scalar_type());
    settings_ = kept_weights(std::move(settings_));
    positions_ = plain::cross_entropy_positions(settings_, logits.size(-1), type, normalization_);
    settings_.targets = positions_.class_index;
    softmax_ = at::empty(logits.sizes(), logits.options().dtype(type));
    WantedOfRows wanted{/*sums=*/true, /*each=*/false, /*prediction=*/count_hits_};
    wanted.unscaled_gradient = true;
    return loss_of_rows(plain::cross_entropy_rows(logits, settings_, positions_, softmax_, /*upstream=*/{}, wanted),
                        logits, settings_, positions_, normalization_.reduction);
  }

  /// For an upstream that is 0-dim or [N].
  at::Tensor gradient(const at::Tensor& logits, const at::Tensor& upstream) {
    const at::NoGradGuard no_grad;
    if (const at::Tensor softmax = std::exchange(softmax_, at::Tensor()); softmax.defined()) {
      const bool is_own = softmax.scalar_type() == logits.scalar_type();
      at::Tensor result = is_own ? softmax : at::empty(logits.sizes(), logits.options());
      const auto rows = [&](const at::Tensor& all) { return all.view({-1, logits.size(-1)}); };
      plain::finish_gradient(rows(softmax), positions_, plain::gradient_factor(positions_, upstream), rows(result));
      return result;
    }
    if (gradient_.defined()) {
      at::Tensor finished = std::exchange(gradient_, at::Tensor());
      if (is_one_on_host(upstream)) return finished;
      // A half gradient has been rounded, small ones to nothing: a loss scale comes before that or not at all.
      if (finished.scalar_type() == upstream.scalar_type() && keeps_zeros(upstream)) return finished.mul_(upstream);
    }
    at::Tensor fresh = kernels::empty_on_large_pages(logits.sizes(), logits.options());
    const at::Tensor of_each = upstream.expand({settings_.targets.size(0)});
    if (positions_.class_index.defined()) {  // the settings may have lost which targets are ignored
      plain::cross_entropy_rows(logits, settings_, positions_, fresh, of_each, {});
    } else {
      cross_entropy_rows(logits, settings_, positions_, fresh, of_each, {});
    }
    return fresh;
  }

  CrossEntropySettings settings_;
  Normalization normalization_;
  bool count_hits_;
  CrossEntropyPositions positions_;
  at::Tensor gradient_;  ///< what forward has finished, until backward hands it out
  at::Tensor softmax_;   ///< minus one-hot, [..., V] in the type of arithmetic: what backward is to finish
};

/// Over the logits if that is asked for and possible, else into fresh memory.
inline LossAndSums cross_entropy(const char* function, const at::Tensor& logits, const CrossEntropySettings& settings,
                                 const Normalization& normalization, bool count_hits, bool inplace) {
  const bool overwrites = inplace && at::GradMode::is_enabled() && logits.requires_grad() &&
                          normalization.reduction != ReductionKind::none && can_overwrite(logits, settings);
  if (overwrites) return inplace_cross_entropy(function, logits, settings, normalization, count_hits);
  return run(c10::make_intrusive<CrossEntropyPass>(settings, normalization, count_hits), {logits});
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
