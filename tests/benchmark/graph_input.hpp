/// Inputs of a loss that cost next to nothing themselves.
#pragma once

#include <torch/torch.h>

#include <cstdint>

namespace benchmarks {

using torch::Tensor;

struct GraphInputFunction : torch::autograd::Function<GraphInputFunction> {
  static Tensor forward(torch::autograd::AutogradContext* /*context*/, const Tensor& /*anchor*/, const Tensor* values) {
    return values->variable_data();
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* /*context*/,
                                                 const torch::autograd::variable_list& /*gradient*/) {
    return {Tensor(), Tensor()};
  }
};

/// The same memory as a tensor in the middle of a graph, as a model's logits are. What flows back into it is dropped at
/// once, where a leaf would keep it. It can be used for any number of losses, or written over by one.
inline Tensor graph_input(const Tensor& values) {
  return GraphInputFunction::apply(torch::zeros({}, torch::requires_grad()), &values);
}

struct Shape {
  int64_t rows, columns;
};

/// Peaked, as those of a trained model are.
inline Tensor random_logits(Shape shape, torch::ScalarType type) {
  return torch::randn({shape.rows, shape.columns}, type).mul_(4);
}

inline Tensor random_targets(Shape shape) { return torch::randint(shape.columns, {shape.rows}, torch::kLong); }

}  // namespace benchmarks
