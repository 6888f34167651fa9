/// A loss as a node of the graph: what every loss has in common of its way there and back.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <utility>
#include <vector>

#include "free_transformer/detail/autograd/optional_tensor.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// One call of a loss. Its inputs are those tensors that may get a gradient, undefined where there is none.
struct LossPass : torch::CustomClassHolder {
  using Tensors = torch::autograd::variable_list;

  virtual LossAndSums forward(const Tensors& inputs, bool needs_gradient) = 0;
  virtual Tensors backward(const Tensors& inputs, const at::Tensor& upstream) = 0;

  /// What forward leaves for backward: as saved variables of the node, which releases them with the graph.
  virtual std::vector<at::Tensor*> saved_tensors() = 0;
};

struct LossFunction : torch::autograd::Function<LossFunction> {
  static LossPass::Tensors forward(torch::autograd::AutogradContext* context, const at::Tensor& first,
                                   const OptionalTensor& second, const OptionalTensor& third,
                                   const c10::intrusive_ptr<LossPass>& pass) {
    const LossPass::Tensors inputs{first, second.value_or(at::Tensor()), third.value_or(at::Tensor())};
    LossAndSums result = pass->forward(inputs, /*needs_gradient=*/true);
    LossPass::Tensors saved = inputs;
    for (at::Tensor* tensor : pass->saved_tensors()) saved.push_back(std::exchange(*tensor, at::Tensor()));
    context->save_for_backward(std::move(saved));
    context->saved_data["pass"] = c10::IValue::make_capsule(pass);
    context->mark_non_differentiable({result.sums});
    context->set_materialize_grads(false);
    return {std::move(result.loss), std::move(result.sums)};
  }

  static LossPass::Tensors backward(torch::autograd::AutogradContext* context, const LossPass::Tensors& upstream) {
    const auto saved = context->get_saved_variables();
    const auto capsule = context->saved_data["pass"].toCapsule();
    auto& pass = static_cast<LossPass&>(*capsule);
    struct Restored {  // for this one backward
      Restored(std::vector<at::Tensor*> tensors_, const at::Tensor* saved_) : tensors(std::move(tensors_)) {
        for (at::Tensor* tensor : tensors) *tensor = *saved_++;
      }
      ~Restored() {
        for (at::Tensor* tensor : tensors) tensor->reset();
      }
      const std::vector<at::Tensor*> tensors;
    };
    constexpr size_t input_count = 3;
    const Restored restored(pass.saved_tensors(), saved.data() + input_count);
    LossPass::Tensors gradients;
    if (upstream[0].defined()) {
      gradients = pass.backward({saved.begin(), saved.begin() + input_count}, upstream[0]);
    }
    gradients.resize(input_count + 1);
    return gradients;
  }
};

/// The pass's loss, with a graph if one of its inputs asks for it.
inline LossAndSums run(const c10::intrusive_ptr<LossPass>& pass, const at::Tensor& first, const at::Tensor& second = {},
                       const at::Tensor& third = {}) {
  const auto needs_gradient = [](const at::Tensor& input) { return input.defined() && input.requires_grad(); };
  if (at::GradMode::is_enabled() && (needs_gradient(first) || needs_gradient(second) || needs_gradient(third))) {
    auto results = LossFunction::apply(first, optional_tensor(second), optional_tensor(third), pass);
    return {std::move(results[0]), std::move(results[1])};
  }
  const at::NoGradGuard no_grad;
  return pass->forward({first, second, third}, /*needs_gradient=*/false);
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
