/// compute_reconstruction_loss of LinearLogits: the head's product and its gradients.
#pragma once

#include <ATen/ATen.h>

#include <free_transformer/linear_logits.hpp>

#include "choices.hpp"
#include "input.hpp"
#include "paths.hpp"
#include "reconstruction_loss.hpp"
#include "refusal.hpp"

namespace fuzz {

struct Head {
  Input hidden, weight, bias;
  bool has_bias = false;
  int64_t block_bytes = 0;
};

inline bool is_double(const Input& input) { return input.type() == at::kDouble; }

/// Types below float64 mix, and float64 does not.
inline Input some_operand(Choices& choices, const Shape& rows, int64_t width, const Input& hidden) {
  Input input = some_input(choices, rows, width);
  if (is_double(input) != is_double(hidden) && !choices.goes_wrong()) input.numbers = input.numbers.to(hidden.type());
  return input;
}

inline Head some_head(Choices& choices, const Shape& positions, int64_t classes) {
  Head head;
  const int64_t width = 1 + choices.below(20);
  head.hidden = some_input(choices, positions, width);
  const Shape rows = choices.goes_wrong() ? Shape{classes, 2} : Shape{classes};
  head.weight = some_operand(choices, rows, choices.goes_wrong() ? width + 1 : width, head.hidden);
  head.has_bias = choices.seldom(2);
  if (head.has_bias) head.bias = some_operand(choices, {}, choices.goes_wrong() ? classes + 1 : classes, head.hidden);
  if (head.bias.fault == Input::Fault::undefined) head.bias.fault = Input::Fault::integers;  // there need not be one
  head.block_bytes = choices.one_of<int64_t>({0, 1, 3000}, {-1});
  return head;
}

struct ExpectedHead {
  Expected losses, hidden, weight, bias;
};

/// A sum of n products is off by n steps of the sum of their magnitudes, in whichever order it is made, and each product may
/// underflow.
inline Expected product(const Expected& left, const at::Tensor& right, at::ScalarType type) {
  const auto terms = static_cast<double>(right.size(0) + 2);
  const at::Tensor value = left.value.matmul(right), magnitude = left.value.abs().matmul(right.abs());
  const at::Tensor tolerance = left.tolerance.matmul(right.abs()).nan_to_num(infinity);
  const at::Tensor is_in_range = magnitude < largest(arithmetic(type));  // else infinite terms may cancel
  const at::Tensor is_known = left.is_known.all(-1, /*keepdim=*/true) & right.isfinite().all() & is_in_range;
  return {value, tolerance + terms * (arithmetic_step(type) * magnitude + smallest(arithmetic(type))), is_known};
}

/// factors: [N], what each position's loss is multiplied by on the way back.
inline ExpectedHead expected_head(const Head& head, const TargetsAndOptions& of, const at::Tensor& factors) {
  const auto type = head.hidden.type();
  const double step = arithmetic_step(type);
  const at::Tensor hidden = head.hidden.rows(), weight = head.weight.rows();
  const at::Tensor bias = head.has_bias ? head.bias.rows() : at::zeros({1, weight.size(0)}, at::kDouble);
  const at::Tensor logits = hidden.matmul(weight.t()) + bias;
  const at::Tensor magnitude = hidden.abs().matmul(weight.t().abs()) + bias.abs();
  const at::Tensor error =
      (static_cast<double>(hidden.size(1) + 2) * step * magnitude).masked_fill(logits.isfinite().logical_not(), 0);
  auto rows = expected_reconstruction(logits, error.amax(-1, /*keepdim=*/true), of, type);
  const auto finite = [](const at::Tensor& values) { return values.masked_fill(values.abs() == infinity, 0).abs(); };
  const at::Tensor of_finite = finite(hidden).matmul(finite(weight).t()) + finite(bias);  // on its way to -∞, too
  const at::Tensor is_in_range = ((magnitude < 1e37) | ((logits == -infinity) & (of_finite < 1e37))).all(-1);
  rows.losses = rows.losses.known_where(is_in_range | rows.counts.logical_not());
  rows.gradient = rows.gradient.known_where((is_in_range | rows.counts.logical_not()).unsqueeze(1));
  const at::Tensor counted = hidden.masked_fill(rows.counts.logical_not().unsqueeze(1), 0);
  const Expected g = rows.gradient.times(factors.unsqueeze(1));
  const Expected transposed{g.value.t(), g.tolerance.t(), g.is_known.t()};
  ExpectedHead expected;
  expected.losses = rows.losses;
  expected.hidden = product(g, weight, type).known_where(weight.isfinite().all());
  expected.hidden = expected.hidden.only(rows.counts.unsqueeze(1));
  expected.weight = product(transposed, counted, type);
  expected.bias = product(transposed, at::ones({g.value.size(0), 1}, at::kDouble), type);
  return expected;
}

inline void fuzz_linear_logits(Choices& choices) {
  const Shape positions = some_positions(choices);
  const int64_t classes = some_classes(choices);
  const Head head = some_head(choices, positions, classes);
  auto of = some_targets_and_options(choices, positions, classes);
  of.options.inplace(choices.goes_wrong());
  const auto reduction = of.options.reduction();
  const Upstream upstream(choices);
  ExpectedHead expected;
  if (!choices.has_gone_wrong()) {
    const auto count = c10::multiply_integers(positions);
    expected = expected_head(head, of, upstream.of_positions(count, is_none(reduction)));
  }
  on_each_path([&](bool is_strided) {
    const Handed hidden(is_strided ? head.hidden.with_strided_rows() : head.hidden);
    const Handed weight(is_strided ? head.weight.with_strided_rows() : head.weight);
    const Handed bias(head.has_bias ? head.bias : head.hidden);
    free_transformer::LinearLogits logits(hidden.tensor, weight.tensor, head.has_bias ? bias.tensor : at::Tensor());
    logits.block_bytes(head.block_bytes);
    auto tensors = tensors_of(hidden, of);
    tensors.insert(tensors.end(), {weight.tensor, weight.leaf, bias.tensor, bias.leaf});
    const Memory memory(tensors);
    at::Tensor loss;
    if (is_refused(choices.has_gone_wrong() ? Refusal::required : Refusal::wrong, memory,
                   [&] { loss = free_transformer::compute_reconstruction_loss(logits, of.targets, of.options); })) {
      return;
    }
    if (loss.scalar_type() != arithmetic(head.hidden.type())) fail("type of the loss");
    check("loss", loss, reduced(expected.losses, reduction, positions), 2);
    Gradients gradients;
    gradients.add("hidden", hidden, expected.hidden);
    gradients.add("weight", weight, expected.weight);
    if (head.has_bias) gradients.add("bias", bias, expected.bias);
    gradients.check_those_of(loss, upstream.like(loss), Upstream::growth);
    memory.check_untouched("forward or backward");
  });
}

}  // namespace fuzz
