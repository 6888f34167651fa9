/// The fused head's matrix products, for one block of tokens.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/linear_head/gradients.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// Tokens of a block, all of nearly the same size. A block reads the weight for each product, and reads and writes its
/// gradient; that costs as much as the arithmetic of about 16 tokens. Hence 60 MiB where that is 240 tokens or more, as
/// less than a fifteenth is lost then; else 30 MiB, but 56 tokens at least; half of that for half types, whose logits would
/// take half the memory. The threads have no say, so that their number does not change the order of the sums.
inline int64_t tokens_of_block(const LinearInputs& inputs, int64_t tokens) {
  const auto type = arithmetic_type(inputs.hidden.scalar_type());
  const int64_t share = inputs.hidden.scalar_type() == type ? 1 : 2;
  const int64_t bytes_of_token = inputs.classes() * static_cast<int64_t>(at::elementSize(type));
  const int64_t few_bytes = (int64_t{30} << 20) / share, many_bytes = 2 * few_bytes;
  const int64_t default_tokens = many_bytes / bytes_of_token >= 240 / share
                                     ? many_bytes / bytes_of_token
                                     : std::max(56 / share, few_bytes / bytes_of_token);
  const int64_t most =
      inputs.block_bytes > 0 ? std::max<int64_t>(1, inputs.block_bytes / bytes_of_token) : default_tokens;
  const int64_t blocks = std::max<int64_t>(1, (tokens + most - 1) / most);
  return std::max<int64_t>(1, (tokens + blocks - 1) / blocks);
}

/// Calls visit(rows of the weight in the type of arithmetic, first row). A half weight is converted in parts of 2 MiB: a
/// float32 copy of all of it would be twice as large as itself, and smaller parts leave a second thread too little of each
/// product. No part crosses the middle.
template <typename Visit>
void for_each_part_of_weight(const LinearInputs& inputs, const Visit& visit) {
  const at::Tensor& weight = inputs.weight;
  if (!converts_weight(inputs)) return visit(weight, int64_t{0});
  const int64_t rows = std::max<int64_t>(1, (int64_t{1} << 19) / weight.size(1)), middle = inputs.classes() / 2;
  for (int64_t first = 0, end = 0; first < inputs.classes(); first = end) {
    end = std::min(first + rows, first < middle ? middle : inputs.classes());
    visit(weight.narrow(0, first, end - first).to(arithmetic_type(inputs.hidden.scalar_type())), first);
  }
}

inline void make_logits(const LinearInputs& inputs, const at::Tensor& hidden, const at::Tensor& logits) {
  for_each_part_of_weight(inputs, [&](const at::Tensor& weight, int64_t first) {
    at::Tensor part = logits.narrow(1, first, weight.size(0));
    if (inputs.bias.defined()) {
      at::addmm_out(part, inputs.bias.narrow(0, first, weight.size(0)).to(weight.scalar_type()), hidden, weight.t());
    } else {
      at::mm_out(part, hidden, weight.t());
    }
  });
}

/// Adds what the gradient of a block's logits gives to the inputs' gradients, which have no value before the first block;
/// `hidden_gradient` is the block's own part.
inline void add_to_gradients(const LinearInputs& inputs, const at::Tensor& hidden, const at::Tensor& of_logits,
                             const at::Tensor& hidden_gradient, const LinearGradients& gradients, bool is_first_block) {
  const int beta = is_first_block ? 0 : 1;
  for_each_part_of_weight(inputs, [&](const at::Tensor& weight, int64_t first) {
    const int64_t count = weight.size(0);
    const at::Tensor part = of_logits.narrow(1, first, count);
    if (hidden_gradient.defined()) hidden_gradient.addmm_(part, weight, /*beta=*/first == 0 ? 0 : 1);
    if (gradients.weight.defined()) gradients.weight.rows(first, count).addmm_(part.t(), hidden, beta);
  });
  if (gradients.bias.defined())
    gradients.bias.addmv_(of_logits.t(), at::ones({hidden.size(0)}, hidden.options()), beta);
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
