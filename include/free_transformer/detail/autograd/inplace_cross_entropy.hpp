/// Cross entropy whose gradient is written over the logits, and what keeps a wrong use from being a wrong number.
/// The forward pass writes it; of float16 logits, and on devices, the backward pass.
///
/// Autograd sees the logits as changed in place by this node: an operation that has saved them before refuses its
/// backward, and whoever reads them afterwards gets this node for their history, which refuses a gradient for them.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/variable.h>

#include <cstdint>
#include <utility>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/autograd/graph_node.hpp"
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

/// The loss, on top of the history that the logits have had so far. Its value is filled in later.
struct InplaceCrossEntropy final : GraphOperation {
  CrossEntropySettings settings;  ///< until backward has written the gradient
  CrossEntropyPositions positions;
  at::Tensor logits;    ///< their memory, until backward hands it out as the gradient
  int64_t version = 0;  ///< of that memory, after forward
  bool holds_gradient = false;
  CallersTensor callers_logits{c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>()};

  Tensors node_forward(GraphNode& /*node*/, const Tensors& inputs) override {
    return {at::empty({}, inputs[0].options().dtype(arithmetic_type(inputs[0].scalar_type())))};
  }

  Tensors node_backward(GraphNode& /*node*/, const at::Tensor& upstream) override {
    constexpr const char* function = "compute_reconstruction_loss";
    TORCH_CHECK(!at::GradMode::is_enabled(), function, ": inplace must be false for a double backward (create_graph)");
    TORCH_CHECK(logits.defined(), function, ": inplace must be false for a second backward");
    TORCH_CHECK(static_cast<int64_t>(logits._version()) == version, function,
                ": logits were changed after inplace had overwritten them with their gradient");
    if (auto callers = callers_logits.lock()) check_retains_no_grad(function, at::Tensor(std::move(callers)));
    const at::Tensor gradient = std::exchange(logits, at::Tensor());
    const auto own_settings = std::exchange(settings, CrossEntropySettings());
    const auto own_positions = std::exchange(positions, CrossEntropyPositions());
    if (!holds_gradient) {
      const at::Tensor of_each = upstream.expand({own_settings.targets.size(0)});
      cross_entropy_rows(gradient, own_settings, own_positions, gradient, of_each, {});
    } else if (!is_one(host_value(upstream))) {
      for_each_row_block(gradient, 0, [&](const at::Tensor& block, int64_t) {
        const at::Tensor no_loss = keeps_zeros(upstream) ? at::Tensor() : (block == 0).all(-1, /*keepdim=*/true);
        block.copy_(block.to(upstream.scalar_type()).mul_(upstream));
        if (no_loss.defined()) block.masked_fill_(no_loss, 0);
      });
    }
    if (gradient.device().is_cpu()) OverwrittenLogits::instance().add(gradient);
    return {gradient};
  }
};

/// The history of the logits from now on.
struct OverwrittenHistory final : BackwardOperation {
  Tensors node_backward(GraphNode& /*node*/, const at::Tensor& /*upstream*/) override {
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
  const auto operation = c10::make_intrusive<InplaceCrossEntropy>();
  const at::Tensor loss = apply_in_graph(operation, {logits})[0];
  rebase_history(c10::make_intrusive<OverwrittenHistory>(), logits);  // before the first write: autograd may refuse
  const at::NoGradGuard no_grad;
  // float16 would underflow before a gradient scaler's factor arrives, which backward knows; on a device nobody sees
  // whether there is such a factor
  operation->holds_gradient = logits.device().is_cpu() && logits.scalar_type() != at::kHalf;
  operation->logits = logits.detach();
  operation->version = static_cast<int64_t>(logits._version());
  operation->callers_logits = CallersTensor(logits.getIntrusivePtr());
  if (operation->holds_gradient) OverwrittenLogits::instance().add(operation->logits);
  const auto positions = cross_entropy_positions(operation->logits, settings, normalization);
  const auto result = cross_entropy_forward(operation->logits, settings, positions, normalization.reduction, count_hits,
                                            operation->holds_gradient ? operation->logits : at::Tensor());
  loss.detach().copy_(result.loss);
  if (!operation->holds_gradient) operation->settings = kept_settings(settings), operation->positions = positions;
  return {loss, result.sums};
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
