/// A loss as a node of the graph: what every loss has in common of its way there and back.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/intrusive_ptr.h>

#include <cstddef>
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
  Tensors node_forward(GraphNode& node, const Tensors& inputs) final {
    LossAndSums result = forward(inputs, /*needs_gradient=*/true);
    Tensors saved = inputs;
    for (at::Tensor* tensor : saved_tensors()) saved.push_back(std::exchange(*tensor, at::Tensor()));
    node.save_for_backward(saved);
    return {std::move(result.loss), std::move(result.sums)};
  }

  Tensors node_backward(GraphNode& node, const at::Tensor& upstream) final {
    const auto saved = node.saved_tensors();
    struct Restored {  // for this one backward
      ~Restored() {
        for (at::Tensor* tensor : tensors) tensor->reset();
      }
      const std::vector<at::Tensor*> tensors;
    };
    const Restored restored{saved_tensors()};
    const auto end_of_inputs = saved.end() - static_cast<std::ptrdiff_t>(restored.tensors.size());
    auto restored_tensor = end_of_inputs;
    for (at::Tensor* tensor : restored.tensors) *tensor = *restored_tensor++;
    return backward({saved.begin(), end_of_inputs}, upstream);
  }
};

/// The pass's loss, with a graph if one of its inputs asks for it.
inline LossAndSums run(const c10::intrusive_ptr<LossPass>& pass, const LossPass::Tensors& inputs) {
  if (needs_graph(inputs)) {
    auto results = apply_in_graph(pass, inputs);
    return {std::move(results[0]), std::move(results[1])};
  }
  const at::NoGradGuard no_grad;
  LossAndSums result = pass->forward(inputs, /*needs_gradient=*/false);
  result.loss = as_no_view(result.loss);
  return result;
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
