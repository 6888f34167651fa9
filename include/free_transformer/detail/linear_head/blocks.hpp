/// Cross entropy of hidden weight^T + bias on the CPU, one block of tokens after another: the logits of a block are made
/// in a buffer, turned into their gradient there, and multiplied on into the gradients of the operands.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/cross_entropy.hpp"
#include "free_transformer/detail/kernels/vector/large_pages.hpp"
#include "free_transformer/detail/linear_head/gradients.hpp"
#include "free_transformer/detail/linear_head/products.hpp"
#include "free_transformer/detail/plain/cross_entropy.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

struct LinearRows {
  CrossEntropyRows rows;
  LinearGradients gradients;
};

/// All of hidden [N, D], every position of which counts or may be computed in vain. upstream is [N] and multiplies the
/// scales, or undefined.
inline LinearRows rows_of_blocks(const LinearInputs& inputs, const at::Tensor& hidden,
                                 const CrossEntropySettings& settings, const CrossEntropyPositions& positions,
                                 const at::Tensor& upstream, const WantedOfHead& gradients,
                                 const WantedOfRows& wanted) {
  const auto type = arithmetic_type(inputs.hidden.scalar_type());
  const auto options = hidden.options().dtype(type);
  const int64_t rows = hidden.size(0), tokens = tokens_of_block(inputs, rows);
  LinearRows result;
  if (gradients.hidden) result.gradients.hidden = at::empty(hidden.sizes(), options);
  if (gradients.weight) result.gradients.weight = WeightGradient(inputs);
  if (gradients.bias) result.gradients.bias = at::empty({inputs.classes()}, options);
  if (rows == 0 && gradients.weight) result.gradients.weight.zero();  // no block gives it a value
  if (rows == 0 && gradients.bias) result.gradients.bias.zero_();
  const at::Tensor buffer = kernels::empty_on_large_pages({tokens, inputs.classes()}, options);

  std::vector<CrossEntropyRows> blocks;
  for (int64_t first = 0; first < rows; first += tokens) {
    const int64_t count = std::min(tokens, rows - first);
    const auto part = [&](const at::Tensor& all) { return all.defined() ? all.narrow(0, first, count) : all; };
    const at::Tensor block = part(hidden).to(type), logits = buffer.narrow(0, 0, count);
    make_logits(inputs, block, logits);
    blocks.push_back(cross_entropy_rows(logits, part_of(settings, part), part_of(positions, part),
                                        gradients.any() ? logits : at::Tensor(), part(upstream), wanted)
                         .rows);
    if (gradients.any()) {
      add_to_gradients(inputs, block, logits, part(result.gradients.hidden), result.gradients, first == 0);
    }
  }
  result.rows = plain::joined(blocks, options);
  return result;
}

/// The same for the positions that count alone: the others' rows and gradients are 0 without a product.
inline LinearRows linear_rows(const LinearInputs& inputs, const CrossEntropySettings& settings,
                              const CrossEntropyPositions& positions, const at::Tensor& upstream,
                              const WantedOfHead& gradients, const WantedOfRows& wanted) {
  const at::Tensor hidden = inputs.hidden.detach().reshape({-1, inputs.hidden.size(-1)});
  const at::Tensor index = positions.left_out.defined() ? (positions.left_out == 0).nonzero().squeeze(1) : at::Tensor();
  if (!index.defined() || index.size(0) == hidden.size(0)) {
    return rows_of_blocks(inputs, hidden, settings, positions, upstream, gradients, wanted);
  }
  const auto select = [&](const at::Tensor& all) { return all.defined() ? all.index_select(0, index) : all; };
  LinearRows result = rows_of_blocks(inputs, select(hidden), part_of(settings, select), part_of(positions, select),
                                     select(upstream), gradients, wanted);
  CrossEntropyRows& rows = result.rows;
  for (at::Tensor* values : {&rows.nll, &rows.likelihood_loss, &rows.log_sum_exp, &rows.prediction, &rows.entropy,
                             &result.gradients.hidden}) {
    if (!values->defined()) continue;
    auto shape = values->sizes().vec();
    shape[0] = hidden.size(0);
    *values = at::zeros(shape, values->options()).index_copy_(0, index, *values);
  }
  return result;
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
