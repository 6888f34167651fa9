/// The second message of a loss over a split vocabulary: what the rows of all ranks say together.
#pragma once

#include <ATen/ATen.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/distributed/rank_group.hpp"
#include "free_transformer/detail/distributed/vocabulary_shard.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// One all-reduce of two numbers a row: others and target; one more with class weights, one more with label smoothing.
inline VocabularyRows summed_rows(const char* function, const RankGroup& ranks, const ShardRows& rows,
                                  double reference) {
  VocabularyRows all = scaled(rows, at::full({}, reference, rows.sum.options()));
  std::vector<at::Tensor> parts;
  for (const at::Tensor* field : all.summands()) parts.push_back(*field);
  if (all.weight.defined()) parts.push_back(all.weight.reshape({1}));
  const at::Tensor message = at::cat(parts);
  ranks.sum(function, message);
  int64_t place = 0;
  for (at::Tensor* field : all.summands()) {
    *field = message.narrow(0, place, field->size(0));
    place += field->size(0);
  }
  if (all.weight.defined()) all.weight = message.select(0, place);
  return all;
}

/// The class of the highest logit (of a NaN where there is one, as `at::max` has it), the lowest on a tie: [N] of the
/// rows of all ranks, whose maxima leave the target's logit out.
inline at::Tensor most_likely_class(const ShardRows& rows, const at::Tensor& target, const at::Tensor& targets) {
  const at::Tensor logits = at::cat({rows.maximum, target.unsqueeze(0)});
  const at::Tensor classes = at::cat({rows.runner_up, targets.to(at::kDouble).unsqueeze(0)});
  const at::Tensor is_highest = (logits == logits.amax(0)) | logits.isnan();
  return classes.masked_fill(is_highest == 0, std::numeric_limits<double>::max()).amin(0).to(at::kLong);
}

/// One all-gather of three to seven numbers a row, of which each rank gets those of all: where no reference fits all
/// rows, or where the most likely class is wanted.
inline VocabularyRows gathered_rows(const char* function, const RankGroup& ranks, ShardRows rows,
                                    const at::Tensor& targets) {
  const int64_t count = targets.size(0);
  std::vector<at::Tensor> parts;
  for (const at::Tensor* field : rows.fields()) parts.push_back(*field);
  if (rows.weight.defined()) parts.push_back(rows.weight.reshape({1}));
  const at::Tensor message = ranks.gather(function, at::cat(parts));
  int64_t place = 0;
  for (at::Tensor* field : rows.fields()) {
    *field = message.narrow(1, place, count);
    place += count;
  }
  if (rows.weight.defined()) rows.weight = message.narrow(1, place, 1);

  const at::Tensor target = rows.target.sum(0);
  const at::Tensor highest = count == 0 ? target : at::maximum(rows.maximum.amax(0), target);
  VocabularyRows all = scaled(rows, finite_or_zero(highest));
  for (at::Tensor* field : all.summands()) *field = field->sum(0);
  if (all.weight.defined()) all.weight = all.weight.sum();
  if (rows.runner_up.defined()) all.prediction = most_likely_class(rows, target, targets);
  return all;
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
