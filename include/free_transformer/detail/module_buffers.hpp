/// The buffers of a module as its own code sees its parameters: to be replaced or taken away.
#pragma once

#include <ATen/ATen.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/module.h>
#include <torch/ordered_dict.h>

#include <string>

#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

struct BufferAccess;

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL

/// `torch::nn::Module` has its parameters protected but its buffers private, and no function that unregisters one. Each
/// `Cloneable` is its friend.
template <>
class torch::nn::Cloneable<free_transformer::detail::BufferAccess> {
 public:
  static torch::OrderedDict<std::string, at::Tensor>& of(torch::nn::Module& module) { return module.buffers_; }
};

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

inline torch::OrderedDict<std::string, at::Tensor>& buffers_of(torch::nn::Module& module) {
  return torch::nn::Cloneable<BufferAccess>::of(module);
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
