/// Cross entropy whose gradient is written over the logits, and what keeps a wrong use from being a wrong number.
/// The forward pass writes it; of float16 logits, and on devices, the backward pass.
///
/// Autograd sees the logits as changed in place by this node: an operation that has saved them before refuses its
/// backward, and whoever reads them afterwards gets this node for their history, which refuses a gradient for them.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/custom_class.h>

#include <cstdint>
#include <utility>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/autograd/overwritten_logits.hpp"
#include "free_transformer/detail/checks/memory.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/cross_entropy.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/numbers.hpp"
#include "free_transformer/detail/plain/row_blocks.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// The tensor that the caller holds, as long as it lives.
using CallersTensor = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

struct InplaceState : torch::CustomClassHolder {
  CrossEntropySettings settings;  ///< until backward has written the gradient
  CrossEntropyPositions positions;
  at::Tensor logits;    ///< their memory, until backward hands it out as the gradient
  int64_t version = 0;  ///< of that memory, after forward
  bool holds_gradient = false;
  CallersTensor callers_logits{c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>()};
};

/// A gradient that the caller has asked to keep would never come: the graph ends where the logits are written over.
inline void check_retains_no_grad(const char* function, const at::Tensor& logits) {
  const bool retains = logits.retains_grad() || (logits.is_view() && logits._base().retains_grad());
  TORCH_CHECK(!retains, function,
              ": logits must not retain_grad() (nor what they are a view of) with inplace: the gradient is where the ",
              "logits were");
}

inline void check_may_be_overwritten(const char* function, const at::Tensor& logits) {
  const bool is_leaf =
      logits.is_leaf() || (logits.is_view() && logits._base().is_leaf() && logits._base().requires_grad());
  TORCH_CHECK(!is_leaf, function,
              ": logits must not be a leaf that requires grad, or a view of one, with inplace: its value ",
              "would be lost");
  TORCH_CHECK(!logits.is_view() || torch::autograd::impl::get_view_autograd_meta(logits)->get_creation_meta() ==
                                       torch::autograd::CreationMeta::DEFAULT,
              function, ": logits must not be one of several outputs of an operation (chunk, unbind), or a view that ",
              "was made without grad mode, with inplace: autograd cannot follow a change of it");
  TORCH_CHECK(elements_lie_apart(logits), function,
              ": logits must not share memory among their own elements (expand, unfold, as_strided) with inplace, got ",
              "shape ", logits.sizes(), " of strides ", logits.strides());
  check_retains_no_grad(function, logits);
}

/// The node of the loss, on top of the history that the logits have had so far. Its value is filled in later.
struct InplaceCrossEntropyFunction : torch::autograd::Function<InplaceCrossEntropyFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& logits,
                            const c10::intrusive_ptr<InplaceState>& state) {
    context->saved_data["state"] = c10::IValue::make_capsule(state);
    return at::empty({}, logits.options().dtype(arithmetic_type(logits.scalar_type())));
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& upstream) {
    constexpr const char* function = "compute_reconstruction_loss";
    const auto capsule = context->saved_data["state"].toCapsule();
    auto& state = static_cast<InplaceState&>(*capsule);
    TORCH_CHECK(!at::GradMode::is_enabled(), function, ": inplace must be false for a double backward (create_graph)");
    TORCH_CHECK(state.logits.defined(), function, ": inplace must be false for a second backward");
    TORCH_CHECK(static_cast<int64_t>(state.logits._version()) == state.version, function,
                ": logits were changed after inplace had overwritten them with their gradient");
    if (auto logits = state.callers_logits.lock()) check_retains_no_grad(function, at::Tensor(std::move(logits)));
    const at::Tensor gradient = std::exchange(state.logits, at::Tensor());
    const auto settings = std::exchange(state.settings, CrossEntropySettings());
    const auto positions = std::exchange(state.positions, CrossEntropyPositions());
    if (!state.holds_gradient) {
      cross_entropy_rows(gradient, settings, positions, gradient, upstream[0].expand({settings.targets.size(0)}), {});
    } else if (!is_one(host_value(upstream[0]))) {
      for_each_row_block(gradient, 0, [&](at::Tensor block, int64_t) {
        block.copy_(block.to(upstream[0].scalar_type()).mul_(upstream[0]));
      });
    }
    return {gradient, {}};
  }
};

/// The history of the logits from now on.
struct OverwrittenFunction : torch::autograd::Function<OverwrittenFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& logits) {
    context->mark_dirty({logits});
    return logits;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                 const torch::autograd::variable_list&) {
    TORCH_CHECK(false,
                "compute_reconstruction_loss: logits were read after inplace had overwritten them with their gradient");
  }
};

inline LossAndSums inplace_cross_entropy(const char* function, const at::Tensor& logits,
                                         const CrossEntropySettings& settings, const Normalization& normalization,
                                         bool count_hits) {
  check_may_be_overwritten(function, logits);
  check_not_overwritten(function, "targets", settings.targets, logits);
  check_not_overwritten(function, "token_weight", settings.token_weight, logits);
  check_not_overwritten(function, "weight", settings.class_weight, logits);
  const auto state = c10::make_intrusive<InplaceState>();
  const at::Tensor loss = InplaceCrossEntropyFunction::apply(logits, state);
  OverwrittenFunction::apply(logits);  // before the first write: autograd may refuse
  const at::NoGradGuard no_grad;
  // float16 would underflow before a gradient scaler's factor arrives, which backward knows; on a device nobody sees
  // whether there is such a factor
  state->holds_gradient = logits.device().is_cpu() && logits.scalar_type() != at::kHalf;
  state->logits = logits.detach();
  state->version = static_cast<int64_t>(logits._version());
  state->callers_logits = CallersTensor(logits.getIntrusivePtr());
  if (state->holds_gradient) OverwrittenLogits::instance().add(state->logits);
  const auto positions = cross_entropy_positions(state->logits, settings, normalization);
  const auto result = cross_entropy_forward(state->logits, settings, positions, normalization.reduction, count_hits,
                                            state->holds_gradient ? state->logits : at::Tensor());
  loss.detach().copy_(result.loss);
  if (!state->holds_gradient) state->settings = kept_settings(settings), state->positions = positions;
  return {loss, result.sums};
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
