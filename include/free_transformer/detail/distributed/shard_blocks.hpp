/// Where a rank's columns come from, block by block: logits that lie there, or a shard of the head that makes them.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/distributed/vocabulary_shard.hpp"
#include "free_transformer/detail/linear_head/products.hpp"
#include "free_transformer/detail/plain/row_blocks.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// visit(block [rows, classes], first row) for all rows of this rank's logits, without their padding.
template <typename Visit>
void for_each_shard_block(const at::Tensor& logits, const VocabularyShard& shard, const Visit& visit) {
  if (shard.classes > 0) for_each_row_block(logits.narrow(-1, 0, shard.classes), 0, visit);
}

/// The operands of the classes alone.
inline LinearInputs without_padding(LinearInputs inputs, const VocabularyShard& shard) {
  inputs.weight = inputs.weight.detach().narrow(0, 0, shard.classes);
  if (inputs.bias.defined()) inputs.bias = inputs.bias.detach().narrow(0, 0, shard.classes);
  return inputs;
}

/// hidden as [N, D], 0 at `left_out` if it is defined: whatever is there would reach the products.
inline at::Tensor rows_of_hidden(const LinearInputs& inputs, const at::Tensor& left_out) {
  const at::Tensor hidden = inputs.hidden.detach().reshape({-1, inputs.hidden.size(-1)});
  return left_out.defined() ? hidden.masked_fill(left_out.unsqueeze(1), 0) : hidden;
}

/// visit(logits [rows, classes], first row, hidden of the rows) for all rows of hidden, [N, D]. The logits are in a
/// buffer in the type of arithmetic, and visit may change them.
template <typename Visit>
void for_each_shard_block(const LinearInputs& classes, const at::Tensor& hidden, const Visit& visit) {
  const int64_t rows = hidden.size(0);
  if (classes.classes() == 0 || rows == 0) return;
  const auto type = arithmetic_type(hidden.scalar_type());
  const int64_t tokens = tokens_of_block(classes, rows);
  const at::Tensor buffer = at::empty({tokens, classes.classes()}, hidden.options().dtype(type));
  for (int64_t first = 0; first < rows; first += tokens) {
    const int64_t count = std::min(tokens, rows - first);
    const at::Tensor block = hidden.narrow(0, first, count).to(type), logits = buffer.narrow(0, 0, count);
    make_logits(classes, block, logits);
    visit(logits, first, block);
  }
}

/// The rows of this rank's columns. walk(visit) is one of the above.
template <typename Walk>
ShardRows shard_rows(const Walk& walk, const VocabularyShard& shard, const CrossEntropySettings& settings,
                     const WantedOfRows& wanted) {
  const at::Tensor& targets = settings.targets;
  const auto options = targets.options().dtype(at::kDouble);
  std::vector<ShardRows> blocks;
  walk([&](const at::Tensor& block, int64_t first) {
    const auto part = [&](const at::Tensor& all) { return all.narrow(0, first, block.size(0)); };
    blocks.push_back(shard_rows_of_block(block, ShardTargets(part(targets), shard), settings, shard, wanted));
  });
  ShardRows rows = blocks.empty() ? empty_shard_rows(targets.size(0), settings, wanted, options) : joined(blocks);
  if (settings.label_smoothing > 0) {
    rows.weight = settings.class_weight.defined() ? ordered_sum(settings.class_weight, at::kDouble)
                                                  : at::full({}, static_cast<double>(shard.classes), options);
  }
  return rows;
}

/// What belongs to some of the rows, of which select(values) are the values.
template <typename Select>
ShardGradient part_of(ShardGradient gradient, const Select& select) {
  for (at::Tensor* values : gradient.tensors()) {
    if (values->defined()) *values = select(*values);
  }
  return gradient;
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
