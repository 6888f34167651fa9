/// The one class of node that this library puts into autograd's graph: an operation that keeps what it needs for its
/// backward. Each class derived from LibTorch's `Function` would cost a user another half second of compiling.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include "free_transformer/detail/autograd/optional_tensor.hpp"
#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

struct GraphOperation : torch::CustomClassHolder {
  using Tensors = torch::autograd::variable_list;
  using Context = torch::autograd::AutogradContext;

  /// Undefined inputs stand for those that are not there.
  virtual Tensors node_forward(Context& context, const Tensors& inputs) = 0;
  /// The gradients of the inputs; those at the end may be left out.
  virtual Tensors node_backward(Context& context, const Tensors& upstream) = 0;
};

struct GraphNode : torch::autograd::Function<GraphNode> {
  static constexpr size_t input_count = 3;

  static GraphOperation::Tensors forward(GraphOperation::Context* context, const at::Tensor& first,
                                         const OptionalTensor& second, const OptionalTensor& third,
                                         const c10::intrusive_ptr<GraphOperation>& operation) {
    context->saved_data["operation"] = c10::IValue::make_capsule(operation);
    return operation->node_forward(*context, {first, second.value_or(at::Tensor()), third.value_or(at::Tensor())});
  }

  static GraphOperation::Tensors backward(GraphOperation::Context* context, const GraphOperation::Tensors& upstream) {
    const auto capsule = context->saved_data["operation"].toCapsule();
    auto gradients = static_cast<GraphOperation&>(*capsule).node_backward(*context, upstream);
    gradients.resize(input_count + 1);
    return gradients;
  }
};

/// The operation's outputs, which have this node for their history.
inline GraphOperation::Tensors apply_in_graph(const c10::intrusive_ptr<GraphOperation>& operation,
                                              const at::Tensor& first, const at::Tensor& second = {},
                                              const at::Tensor& third = {}) {
  return GraphNode::apply(first, optional_tensor(second), optional_tensor(third), operation);
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
