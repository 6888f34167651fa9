/// Cross entropy of hidden weight^T + bias as a node of the graph.
///
/// Saved for backward: hidden, weight, bias, and (but for kNone) their gradients in the type of arithmetic, until
/// backward hands them out: half types would underflow before a gradient scaler's factor arrives.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <c10/util/intrusive_ptr.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/autograd/loss_node.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/cross_entropy.hpp"
#include "free_transformer/detail/linear_head/blocks.hpp"
#include "free_transformer/detail/linear_head/device_blocks.hpp"
#include "free_transformer/detail/linear_head/device_gradients.hpp"
#include "free_transformer/detail/linear_head/gradients.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/plain/cross_entropy.hpp"
#include "free_transformer/detail/positions.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

inline CrossEntropyPositions linear_positions(const LinearInputs& inputs, const CrossEntropySettings& settings,
                                              const Normalization& normalization) {
  return plain::cross_entropy_positions(settings, inputs.classes(), arithmetic_type(inputs.hidden.scalar_type()),
                                        normalization);
}

class LinearLossPass final : public LossPass {
 public:
  LinearLossPass(const CrossEntropySettings& settings, const Normalization& normalization, bool count_hits,
                 int64_t block_bytes)
      : settings_(settings), normalization_(normalization), count_hits_(count_hits), block_bytes_(block_bytes) {}

  LossAndSums forward(const Tensors& tensors, bool needs_gradient) override {
    const LinearInputs inputs = as_inputs(tensors);
    if (needs_gradient) settings_ = kept_settings(std::move(settings_));
    positions_ = linear_positions(inputs, settings_, normalization_);
    normalization_.tensor.reset();
    const bool for_each = normalization_.reduction == ReductionKind::none;
    WantedOfHead wanted;
    if (needs_gradient && !for_each) wanted = wanted_gradients(inputs);
    const CrossEntropyRows rows =
        walk(inputs, /*upstream=*/{}, wanted, {/*sums=*/false, /*each=*/true, /*prediction=*/count_hits_});
    has_gradients_ = wanted.any();
    const at::Tensor sums = plain::reconstruction_sums(rows, settings_, positions_);
    if (for_each) {
      const at::Tensor losses = losses_of_rows(rows, settings_, positions_);
      return {losses.reshape(shape_of_positions(inputs.hidden)), sums};
    }
    return {reduced_loss(sums, positions_.scales, settings_.z_loss > 0, arithmetic_type(inputs.hidden.scalar_type())),
            sums};
  }

  Tensors backward(const Tensors& tensors, const at::Tensor& upstream) override {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "compute_reconstruction_loss: LinearLogits must not be differentiated twice ",
                "(create_graph); pass dense logits for that");
    const LinearInputs inputs = as_inputs(tensors);
    const auto type = arithmetic_type(inputs.hidden.scalar_type());
    const at::Tensor flat = (upstream.dim() == 0 ? upstream : upstream.reshape({-1})).to(type);
    const bool is_cpu = inputs.hidden.device().is_cpu(), is_one_for_all = flat.dim() == 0;
    if (!std::exchange(has_gradients_, false) || (is_one_for_all && !keeps_zeros(flat))) {
      const at::Tensor of_each =
          is_cpu || !is_one_for_all ? flat.expand({settings_.targets.size(0)}) : at::Tensor();  // or left for the end
      walk(inputs, of_each, wanted_gradients(inputs), {/*sums=*/false});
      if (is_cpu) return in_own_types(std::exchange(gradients_, {}), inputs);
    }
    if (!is_cpu) return device_gradients_.finished(inputs, is_one_for_all ? flat : at::Tensor());
    LinearGradients finished = std::exchange(gradients_, {});
    if (!is_one_on_host(flat)) finished.multiply(flat);
    return in_own_types(std::move(finished), inputs);
  }

  std::vector<at::Tensor*> saved_tensors() override { return tensors_of(settings_, positions_); }

 private:
  LinearInputs as_inputs(const Tensors& tensors) const { return {tensors[0], tensors[1], tensors[2], block_bytes_}; }

  /// All blocks, which leave their gradients with this pass.
  CrossEntropyRows walk(const LinearInputs& inputs, const at::Tensor& upstream, const WantedOfHead& gradients,
                        const WantedOfRows& wanted) {
    if (inputs.hidden.device().is_cpu()) {
      LinearRows of_blocks = linear_rows(inputs, settings_, positions_, upstream, gradients, wanted);
      gradients_ = std::move(of_blocks.gradients);
      return std::move(of_blocks.rows);
    }
    DeviceLinearRows of_blocks = device_linear_rows(inputs, settings_, positions_, upstream, gradients, wanted);
    device_gradients_ = std::move(of_blocks.gradients);
    return std::move(of_blocks.rows);
  }

  static WantedOfHead wanted_gradients(const LinearInputs& inputs) {
    return {inputs.hidden.requires_grad(), inputs.weight.requires_grad(),
            inputs.bias.defined() && inputs.bias.requires_grad()};
  }

  /// In the inputs' own shapes and types, rounded once, in the order of the inputs.
  static Tensors in_own_types(LinearGradients gradients, const LinearInputs& inputs) {
    Tensors result(3);
    if (gradients.hidden.defined()) {
      result[0] = gradients.hidden.to(inputs.hidden.scalar_type()).reshape(inputs.hidden.sizes());
    }
    if (gradients.weight.defined()) result[1] = gradients.weight.finished();
    if (gradients.bias.defined()) result[2] = gradients.bias.to(inputs.bias.scalar_type());
    return result;
  }

  CrossEntropySettings settings_;
  Normalization normalization_;
  bool count_hits_;
  int64_t block_bytes_;
  CrossEntropyPositions positions_;
  LinearGradients gradients_;  ///< what forward has finished, until backward hands it out
  DeviceGradients device_gradients_;
  bool has_gradients_ = false;
};

inline LossAndSums linear_cross_entropy(const LinearInputs& inputs, const CrossEntropySettings& settings,
                                        const Normalization& normalization, bool count_hits) {
  return run(c10::make_intrusive<LinearLossPass>(settings, normalization, count_hits, inputs.block_bytes),
             {inputs.hidden, inputs.weight, inputs.bias});
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
