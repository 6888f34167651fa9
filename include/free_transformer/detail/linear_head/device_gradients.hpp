/// The gradients of the fused head's operands on a device, while the common factor of their loss has yet to come.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/numbers.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// Without the factor a half type holds them as well as the probabilities that they are made of; with it, 1/tokens,
/// small ones would be 0 before a gradient scaler's factor arrives. Undefined where none is wanted.
struct DeviceGradients {
  at::Tensor hidden;           ///< [N, D] in the type of the products
  at::Tensor weight;           ///< [V, D] in the type of the products after a single block, of arithmetic after more
  at::Tensor bias;             ///< [V] in the type of arithmetic; undefined if it is column D of the weight's
  at::Tensor row_factor;       ///< [N], of the rows of hidden; undefined for 1
  at::Tensor factor;           ///< 0-dim, of all; undefined for 1
  double weight_factor = 1.0;  ///< of the weight's, beside the factor

  /// In the inputs' shapes, types and order, for an upstream that is 0-dim or undefined. Each is rounded once here; this
  /// object is empty then.
  std::vector<at::Tensor> finished(const LinearInputs& inputs, const at::Tensor& upstream) {
    // A number of one dimension takes part in choosing the type to compute in: one of none would be made a half.
    at::Tensor all = at::empty({}, inputs.weight.options().dtype(arithmetic_type(inputs.weight.scalar_type())));
    if (factor.defined() && upstream.defined()) {
      at::mul_out(all, factor, upstream);
    } else if (factor.defined() || upstream.defined()) {
      all.copy_(factor.defined() ? factor : upstream);
    } else {
      all.fill_(1);
    }
    all = all.unsqueeze(0);
    std::vector<at::Tensor> result(3);
    if (hidden.defined()) {
      const at::Tensor of_rows = row_factor.defined() ? (row_factor * all).unsqueeze(1) : all;
      result[0] = scaled(hidden, of_rows, inputs.hidden.scalar_type()).reshape(inputs.hidden.sizes());
    }
    if (bias.defined()) result[2] = scaled(bias, all, inputs.bias.scalar_type());
    if (weight.defined()) {
      const int64_t width = inputs.weight.size(1);
      if (!is_one(weight_factor)) all = all * weight_factor;
      if (weight.size(1) > width) result[2] = scaled(weight.select(1, width), all, inputs.bias.scalar_type());
      result[1] = scaled(weight.narrow(1, 0, width), all, inputs.weight.scalar_type());
    }
    *this = {};
    return result;
  }

 private:
  /// In its own memory where that is the result's.
  static at::Tensor scaled(const at::Tensor& gradient, const at::Tensor& by, at::ScalarType type) {
    if (gradient.scalar_type() == type && gradient.is_contiguous()) return at::Tensor(gradient).mul_(by);
    at::Tensor result = at::empty(gradient.sizes(), gradient.options().dtype(type));
    return at::mul_out(result, gradient, by);
  }
};

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
