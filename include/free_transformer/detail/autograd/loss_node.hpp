/// A loss as a node of the graph: what every loss has in common of its way there and back.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/intrusive_ptr.h>

#include <utility>
#include <vector>

#include "free_transformer/detail/autograd/graph_node.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// One call of a loss. Its inputs are those tensors that may get a gradient, undefined where there is none.
class LossPass : public GraphOperation {
 public:
  virtual LossAndSums forward(const Tensors& inputs, bool needs_gradient) = 0;
  virtual Tensors backward(const Tensors& inputs, const at::Tensor& upstream) = 0;

  /// What forward leaves for backward: as saved variables of the node, which releases them with the graph.
  virtual std::vector<at::Tensor*> saved_tensors() = 0;

 private:
  Tensors node_forward(Context& context, const Tensors& inputs) final {
    LossAndSums result = forward(inputs, /*needs_gradient=*/true);
    Tensors saved = inputs;
    for (at::Tensor* tensor : saved_tensors()) saved.push_back(std::exchange(*tensor, at::Tensor()));
    context.save_for_backward(std::move(saved));
    context.mark_non_differentiable({result.sums});
    context.set_materialize_grads(false);
    return {std::move(result.loss), std::move(result.sums)};
  }

  Tensors node_backward(Context& context, const Tensors& upstream) final {
    const auto saved = context.get_saved_variables();
    const at::Tensor* restored_tensor = saved.data() + GraphNode::input_count;
    struct Restored {  // for this one backward
      ~Restored() {
        for (at::Tensor* tensor : tensors) tensor->reset();
      }
      const std::vector<at::Tensor*> tensors;
    };
    const Restored restored{saved_tensors()};
    for (at::Tensor* tensor : restored.tensors) *tensor = *restored_tensor++;
    if (!upstream[0].defined()) return {};
    return backward({saved.begin(), saved.begin() + GraphNode::input_count}, upstream[0]);
  }
};

/// The pass's loss, with a graph if one of its inputs asks for it.
inline LossAndSums run(const c10::intrusive_ptr<LossPass>& pass, const at::Tensor& first, const at::Tensor& second = {},
                       const at::Tensor& third = {}) {
  const auto needs_gradient = [](const at::Tensor& input) { return input.defined() && input.requires_grad(); };
  if (at::GradMode::is_enabled() && (needs_gradient(first) || needs_gradient(second) || needs_gradient(third))) {
    auto results = apply_in_graph(pass, first, second, third);
    return {std::move(results[0]), std::move(results[1])};
  }
  const at::NoGradGuard no_grad;
  return pass->forward({first, second, third}, /*needs_gradient=*/false);
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
