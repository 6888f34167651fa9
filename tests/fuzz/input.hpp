/// A tensor of logits as it is handed to the library: a view of a buffer that the graph ends in.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <string>
#include <vector>

#include "choices.hpp"
#include "expected.hpp"
#include "tensors.hpp"

namespace fuzz {

struct Input {
  /// What must be refused in place of a tensor of logits.
  enum class Fault { none, undefined, integers, no_dimension };

  at::Tensor numbers;  ///< [buffer_size], without a graph
  Layout layout;
  bool is_frozen = false, is_view_of_leaf = false;
  Fault fault = Fault::none;

  at::ScalarType type() const { return numbers.scalar_type(); }
  int64_t width() const { return layout.sizes.back(); }
  Shape positions() const { return {layout.sizes.begin(), layout.sizes.end() - 1}; }

  /// [N, width] in float64.
  at::Tensor rows() const {
    return layout.view(numbers).to(at::kDouble).reshape({c10::multiply_integers(positions()), width()});
  }

  /// The same values where no vector kernel takes them.
  Input with_strided_rows() const {
    Input input = *this;
    input.layout = plain_layout(layout.sizes, 2);
    input.numbers = at::zeros({input.layout.buffer_size}, numbers.options());
    input.layout.view(input.numbers).copy_(layout.view(numbers));
    return input;
  }
};

inline Input some_input(Choices& choices, const Shape& positions, int64_t width) {
  Input input;
  const auto type = some_type(choices);
  input.layout = some_layout(choices, with_last(positions, width));
  input.numbers = some_numbers(choices, {input.layout.buffer_size}, type);
  input.is_frozen = choices.seldom(5);
  input.is_view_of_leaf = choices.seldom(5);
  using Fault = Input::Fault;
  input.fault = choices.one_of({Fault::none}, {Fault::undefined, Fault::integers, Fault::no_dimension});
  return input;
}

/// One use of an input: the leaf of the graph, and the view that is handed over.
struct Handed {
  explicit Handed(const Input& input) : input(input), leaf(input.numbers.clone()) {
    leaf.requires_grad_(!input.is_frozen);
    tensor = input.layout.view(input.is_view_of_leaf ? leaf : leaf.clone());
    if (input.fault == Input::Fault::undefined) tensor = at::Tensor();
    if (input.fault == Input::Fault::integers) tensor = at::zeros(tensor.sizes(), at::kInt);
    if (input.fault == Input::Fault::no_dimension) tensor = tensor.sum();
  }

  /// The gradient of the leaf from that of the view: where elements overlap they add up, and LibTorch rounds each sum.
  Expected of_leaf(const Expected& of_view) const {
    const auto sum = [&](const at::Tensor& values) {
      return at::zeros({input.layout.buffer_size}, at::kDouble)
          .index_add(0, input.layout.places(), values.reshape({-1}));
    };
    const at::Tensor terms = sum(at::ones_like(of_view.value));
    const at::Tensor unknown = sum(of_view.is_known.logical_not().to(at::kDouble));
    const at::Tensor magnitude = sum(of_view.value.abs()), tolerance = sum(of_view.tolerance);
    const double least =
        4 * smallest(input.type());  // each term may have been rounded to a subnormal number, and grown
    const at::Tensor rounding = (terms * (magnitude + least) * epsilon(input.type())).masked_fill(terms <= 1, 0);
    const at::Tensor is_in_range = (terms <= 1) | (magnitude + tolerance < largest(input.type()));  // else ∞ - ∞
    return {sum(of_view.value), tolerance + rounding, (unknown == 0) & is_in_range};
  }

  Input input;
  at::Tensor leaf, tensor;
};

/// Gradient of each leaf that wants one, and what is expected of it.
struct Gradients {
  std::vector<at::Tensor> leaves;
  std::vector<Expected> expected;
  std::vector<std::string> names;

  void add(const std::string& name, const at::Tensor& leaf, const Expected& of_leaf) {
    if (!leaf.requires_grad()) return;
    leaves.push_back(leaf), expected.push_back(of_leaf), names.push_back(name);
  }
  void add(const std::string& name, const Handed& handed, const Expected& of_view) {
    if (handed.leaf.requires_grad()) add(name, handed.leaf, handed.of_leaf(of_view));
  }

  /// growth: of an upstream gradient, which may come after a first rounding.
  void check_those_of(const at::Tensor& result, const at::Tensor& upstream, double growth) const {
    if (leaves.empty()) {
      if (result.requires_grad()) fail("a graph without anything to differentiate");
      return;
    }
    if (!result.requires_grad()) fail("no graph");
    const auto found = torch::autograd::grad({result}, leaves, {upstream});
    for (size_t i = 0; i < found.size(); ++i) {
      if (found[i].scalar_type() != leaves[i].scalar_type()) fail(names[i] + ": type of the gradient");
      check("gradient of " + names[i], found[i], expected[i], 2, growth);
    }
  }
};

/// What the loss is multiplied by on the way back: one factor, or one for each position.
struct Upstream {
  explicit Upstream(Choices& choices)
      : factors(choices.one_of<std::vector<double>>({{1}, {0.5}, {-2}, {1, -2, 0.5, 0}})) {}

  /// [N]
  at::Tensor of_positions(int64_t count, bool is_unreduced) const {
    const auto many = is_unreduced ? static_cast<int64_t>(factors.size()) : 1;
    const at::Tensor all = at::tensor(factors, at::kDouble);
    return all.index({at::arange(count) % many});
  }
  at::Tensor like(const at::Tensor& result) const {
    return of_positions(result.numel(), result.dim() > 0).reshape(result.sizes()).to(result.scalar_type());
  }

  std::vector<double> factors;
  static constexpr double growth = 2;
};

}  // namespace fuzz
