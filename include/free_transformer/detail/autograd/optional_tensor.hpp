/// A tensor that may be missing, as an argument of an autograd function, whose inputs must not be undefined tensors.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

using OptionalTensor = torch::autograd::optional_variable_list::value_type;

inline OptionalTensor optional_tensor(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : OptionalTensor();
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
