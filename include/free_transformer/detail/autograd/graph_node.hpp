/// The one class of node that this library puts into autograd's graph: an operation that keeps what it needs for its
/// backward. It derives from LibTorch's `Node`, as LibTorch's own operations do: the template `Function` around that would
/// cost every unit of a user another two seconds of compiling.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#include "free_transformer/detail/checks/arguments.hpp"
#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

class GraphNode;

/// What a node computes on the way back.
struct BackwardOperation : c10::intrusive_ptr_target {
  using Tensors = torch::autograd::variable_list;

  /// The gradients of the inputs; those at the end may be left out.
  virtual Tensors node_backward(GraphNode& node, const at::Tensor& upstream) = 0;
};

/// And on the way there. Undefined inputs stand for those that are not there.
struct GraphOperation : BackwardOperation {
  /// The first of the results gets the node for its history; the others have none.
  virtual Tensors node_forward(GraphNode& node, const Tensors& inputs) = 0;
};

class GraphNode final : public torch::autograd::Node {
 public:
  using Tensors = GraphOperation::Tensors;

  explicit GraphNode(c10::intrusive_ptr<BackwardOperation> operation) : operation_(std::move(operation)) {}

  /// Nothing where there is no graph: inference tensors cannot be saved.
  void save_for_backward(const Tensors& tensors) {
    saved_.clear();
    if (num_outputs() == 0) return;
    for (const at::Tensor& tensor : tensors) saved_.emplace_back(savable(tensor), /*is_output=*/false);
  }

  /// Throws if one of them was changed since, or if the graph was released.
  Tensors saved_tensors() const {
    TORCH_CHECK(!is_released_, torch::autograd::ERR_BACKWARD_TWICE);
    Tensors tensors;
    for (const auto& saved : saved_) tensors.push_back(saved.unpack());
    return tensors;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    saved_.clear();
    is_released_ = true;
  }

 private:
  /// A constant that was made in InferenceMode as a copy: autograd cannot watch it, and refuses to save it.
  static at::Tensor savable(const at::Tensor& tensor) {
    return tensor.defined() && tensor.is_inference() && !tensor.requires_grad() ? tensor.clone() : tensor;
  }

  Tensors apply(Tensors&& upstream) override {
    const std::lock_guard<std::mutex> lock(mutex_);  // operations hand out what they hold
    Tensors gradients;
    if (upstream[0].defined()) gradients = operation_->node_backward(*this, readable(upstream[0]));
    gradients.resize(num_outputs());
    return gradients;
  }

  c10::intrusive_ptr<BackwardOperation> operation_;
  std::vector<torch::autograd::SavedVariable> saved_;
  bool is_released_ = false;
};

/// A shared pointer, which the newest LibTorch has made an intrusive one: it no longer has the function deleteNode, which
/// lets go of a deep graph without recursion.
using NodePointer = decltype(torch::autograd::Edge::function);

template <typename Pointer = NodePointer>
Pointer make_graph_node(const c10::intrusive_ptr<BackwardOperation>& operation) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return Pointer(new GraphNode(operation), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<GraphNode>(operation);
  }
}

inline NodePointer node_on_top_of(const c10::intrusive_ptr<BackwardOperation>& operation,
                                  const GraphOperation::Tensors& inputs) {
  NodePointer node = make_graph_node(operation);
  for (const at::Tensor& input : inputs) {
    const bool has_edge = input.defined() && input.requires_grad();
    node->add_next_edge(has_edge ? torch::autograd::impl::gradient_edge(input) : torch::autograd::Edge());
  }
  return node;
}

inline bool needs_graph(const GraphOperation::Tensors& inputs) {
  if (!at::GradMode::is_enabled()) return false;
  return std::any_of(inputs.begin(), inputs.end(),
                     [](const at::Tensor& input) { return input.defined() && input.requires_grad(); });
}

/// A view that was made without a graph must not be changed in place with one. The same memory as a tensor of its own may.
inline at::Tensor as_no_view(const at::Tensor& tensor) {
  return tensor.is_view() ? at::_unsafe_view(tensor, tensor.sizes()) : tensor;
}

/// The operation's results.
inline GraphOperation::Tensors apply_in_graph(const c10::intrusive_ptr<GraphOperation>& operation,
                                              const GraphOperation::Tensors& inputs) {
  const bool has_graph = needs_graph(inputs);
  const NodePointer node = has_graph ? node_on_top_of(operation, inputs) : make_graph_node(operation);
  const at::NoGradGuard no_grad;
  auto results = operation->node_forward(static_cast<GraphNode&>(*node), inputs);
  results[0] = as_no_view(results[0]);
  if (has_graph) torch::autograd::impl::set_gradient_edge(results[0], {node, node->add_input_metadata(results[0])});
  return results;
}

/// Autograd sees the tensor as changed in place by the operation, which is its history, and that of what it is a view of,
/// from now on.
inline void rebase_history(const c10::intrusive_ptr<BackwardOperation>& operation, const at::Tensor& tensor) {
  const NodePointer node = node_on_top_of(operation, {tensor});
  torch::autograd::impl::bump_version(tensor);
  torch::autograd::impl::rebase_history(tensor, {node, node->add_input_metadata(tensor)});
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
