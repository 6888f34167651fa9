/// One rank's columns of the logits: what its rows say, what the rows of all ranks say together, and the gradient of
/// its own.
///
/// Each rank keeps its rows' maximum m and sum of exp(x - m), both without the target, whose logit it has or has not.
/// All ranks scale their sums to one reference c and add them up:  others = sum_r exp(m_r - c) sum_r. What follows is
/// that of one rank: nll = log(1 + others / exp(x_y - c)), which keeps the relative accuracy of a confident model. Sums
/// over a row are in the type of arithmetic, everything of one number a row is in float64.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/plain/cross_entropy.hpp"
#include "free_transformer/detail/plain/row_blocks.hpp"
#include "free_transformer/detail/plain/softmax_minus_target.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// Which classes a rank's columns are: columns [P r/R, P (r+1)/R) of P, of which the first V of all are classes.
struct VocabularyShard {
  int64_t vocab_size = 0;  ///< V
  int64_t first = 0;       ///< the class of the first column
  int64_t columns = 0;     ///< of this rank, padding included
  int64_t classes = 0;     ///< those that are none

  static VocabularyShard of_rank(int64_t rank, int64_t ranks, int64_t vocab_size, int64_t padded_size) {
    const auto begin = [&](int64_t of) { return padded_size / ranks * of + padded_size % ranks * of / ranks; };
    const int64_t first = begin(rank), columns = begin(rank + 1) - first;
    return {vocab_size, first, columns, std::max<int64_t>(0, std::min(columns, vocab_size - first))};
  }
};

/// The targets as columns of a shard.
struct ShardTargets {
  at::Tensor is_here;  ///< [N, 1] bool
  at::Tensor column;   ///< [N, 1], some column where the target is elsewhere

  ShardTargets(const at::Tensor& targets, const VocabularyShard& shard) {
    const at::Tensor local = (targets - shard.first).unsqueeze(1);
    column = local.clamp(0, std::max<int64_t>(0, shard.classes - 1));
    is_here = column == local;
    if (shard.classes == 0) is_here.zero_();
  }
};

/// What a rank's columns say of each row, [N] in float64; of several ranks [R, N].
struct ShardRows {
  at::Tensor maximum;        ///< of all columns but the target's; -inf if there is none
  at::Tensor sum;            ///< of exp(x - maximum) over the same
  at::Tensor target;         ///< the target's logit, 0 on all ranks but one
  at::Tensor target_weight;  ///< w_y, 0 on all ranks but one; undefined without class weights
  at::Tensor surprise;       ///< sum of w (maximum - x) over all columns; undefined without label smoothing
  at::Tensor runner_up;      ///< the class that has the maximum, the lowest on a tie; undefined if not asked for
  at::Tensor moment;         ///< sum of exp(x - maximum) (maximum - x), as `sum`; undefined if no entropy is asked for
  at::Tensor weight;         ///< sum of w over the columns: 0-dim, or [R, 1]; undefined without label smoothing

  /// All but `weight`, in one order.
  std::vector<at::Tensor*> fields() {
    std::vector<at::Tensor*> defined;
    for (at::Tensor* field : {&maximum, &sum, &target, &target_weight, &surprise, &runner_up, &moment}) {
      if (field->defined()) defined.push_back(field);
    }
    return defined;
  }
};

/// -inf, which no arithmetic survives, as 0.
inline at::Tensor finite_or_zero(const at::Tensor& maximum) {
  return maximum.masked_fill(maximum == -std::numeric_limits<double>::infinity(), 0);
}

/// Rows without any column.
inline ShardRows empty_shard_rows(int64_t rows, const CrossEntropySettings& settings, const WantedOfRows& wanted,
                                  const at::TensorOptions& options) {
  ShardRows result;
  const at::Tensor zeros = at::zeros({rows}, options);
  result.maximum = at::full({rows}, -std::numeric_limits<double>::infinity(), options);
  result.sum = result.target = zeros;
  if (settings.class_weight.defined()) result.target_weight = zeros;
  if (settings.label_smoothing > 0) result.surprise = zeros;
  if (wanted.prediction) result.runner_up = at::full({rows}, std::numeric_limits<double>::max(), options);
  if (wanted.entropy) result.moment = zeros;
  return result;
}

/// Of a block of this rank's columns, which are classes all.
inline ShardRows shard_rows_of_block(const at::Tensor& block, const ShardTargets& targets,
                                     const CrossEntropySettings& settings, const VocabularyShard& shard,
                                     const WantedOfRows& wanted) {
  ShardRows rows;
  const auto flat = [](const at::Tensor& values) { return values.squeeze(1).to(at::kDouble); };
  const at::Tensor logits = plain::arithmetic_logits(block, settings.softcap);
  const at::Tensor at_target = logits.gather(1, targets.column);
  rows.target = flat(at_target.masked_fill(targets.is_here == 0, 0));
  const at::Tensor hidden_target = at_target.masked_fill(targets.is_here, -std::numeric_limits<double>::infinity());
  at::Tensor others = logits.scatter(1, targets.column, hidden_target);
  at::Tensor maximum, index;
  if (wanted.prediction) {
    std::tie(maximum, index) = others.max(-1, /*keepdim=*/true);
  } else {
    maximum = others.amax(-1, /*keepdim=*/true);
  }
  const at::Tensor reference = finite_or_zero(maximum);
  rows.maximum = flat(maximum);
  if (wanted.prediction) rows.runner_up = flat(index) + static_cast<double>(shard.first);
  const at::Tensor distance = wanted.entropy ? reference - others : at::Tensor();
  others.sub_(reference).exp_();
  rows.sum = sum_of_rows(others).to(at::kDouble);
  if (wanted.entropy) rows.moment = plain::weighted_surprise(others, distance).to(at::kDouble);
  if (settings.class_weight.defined()) {
    rows.target_weight = flat(
        settings.class_weight.gather(0, targets.column.squeeze(1)).unsqueeze(1).masked_fill(targets.is_here == 0, 0));
  }
  if (settings.label_smoothing > 0) {
    const at::Tensor surprise = reference - logits;
    rows.surprise = (settings.class_weight.defined() ? plain::weighted_surprise(settings.class_weight, surprise)
                                                     : sum_of_rows(surprise))
                        .to(at::kDouble);
  }
  return rows;
}

/// The blocks' rows as one.
inline ShardRows joined(std::vector<ShardRows>& blocks) {
  ShardRows result = blocks.front();
  if (blocks.size() == 1) return result;
  const auto fields = result.fields();
  std::vector<std::vector<at::Tensor>> parts(fields.size());
  for (ShardRows& block : blocks) {
    const auto of_block = block.fields();
    for (size_t field = 0; field < fields.size(); ++field) parts[field].push_back(*of_block[field]);
  }
  for (size_t field = 0; field < fields.size(); ++field) *fields[field] = at::cat(parts[field]);
  return result;
}

/// Where the logits of one call lie on a rank, found out before the ranks speak of their rows, [2] in float64: the
/// highest logit of the positions that count, and a floor, which each of them reaches with its highest. The maximum of
/// both over ranks holds for all columns.
inline at::Tensor range_of(const ShardRows& rows, const ShardTargets& targets, const at::Tensor& left_out) {
  constexpr double infinity = std::numeric_limits<double>::infinity(), largest = std::numeric_limits<double>::max();
  if (rows.maximum.size(0) == 0) {
    const auto options = rows.maximum.options();
    return at::stack({at::full({}, -largest, options), at::full({}, largest, options)});
  }
  const at::Tensor target = rows.target.masked_fill(targets.is_here.squeeze(1) == 0, -infinity);
  const at::Tensor reach = at::maximum(rows.maximum, target);
  const at::Tensor is_unusable = left_out | reach.isnan() | (reach == infinity);  // such a row's loss is NaN anyway
  return at::stack({reach.masked_fill(is_unusable, -largest).max(), reach.masked_fill(is_unusable, largest).min()})
      .clamp_min_(-largest);
}

/// How far apart a call's rows may lie to have one reference: below it, exp(x - c) and the quotient of any two that
/// matter are normal numbers of float64, with room for a sum over 2^28 classes.
constexpr double widest_range = 600;

/// The reference that all rows of all ranks have in common.
inline double common_reference(double highest) {
  return highest > -std::numeric_limits<double>::max() ? highest - (widest_range + 50) : 0;
}

/// What all ranks' columns say of each row, [N] in float64.
struct VocabularyRows {
  at::Tensor reference;      ///< c: 0-dim or [N]
  at::Tensor others;         ///< sum of exp(x - c) over all classes but the target
  at::Tensor target;         ///< x_y
  at::Tensor target_weight;  ///< w_y, undefined without class weights
  at::Tensor surprise;       ///< sum of w (c - x), undefined without label smoothing
  at::Tensor weight;         ///< sum of w, 0-dim; undefined without label smoothing
  at::Tensor moment;         ///< sum of exp(x - c) (c - x) over the same as `others`; undefined if not asked for
  at::Tensor prediction;     ///< int64, undefined if not asked for

  std::vector<at::Tensor*> summands() {
    std::vector<at::Tensor*> defined;
    for (at::Tensor* field : {&others, &target, &target_weight, &surprise, &moment}) {
      if (field->defined()) defined.push_back(field);
    }
    return defined;
  }
};

/// The summands of the rows of all ranks: what each rank adds.
inline VocabularyRows scaled(const ShardRows& rows, const at::Tensor& reference) {
  VocabularyRows of;
  of.reference = reference;
  const at::Tensor scale = (rows.maximum - reference).exp_();
  of.others = rows.sum * scale;
  of.target = rows.target;
  of.target_weight = rows.target_weight;
  if (rows.surprise.defined()) {
    of.surprise = rows.surprise + rows.weight * (reference - finite_or_zero(rows.maximum));
    of.weight = rows.weight;
  }
  if (rows.moment.defined()) {
    of.moment = (rows.moment + rows.sum * (reference - finite_or_zero(rows.maximum))) * scale;
  }
  return of;
}

/// -sum_c p_c log p_c, where the reference is the highest logit: no term is negative, and none cancels.
inline at::Tensor entropy_of_vocabulary(const VocabularyRows& of, const at::Tensor& nll) {
  const at::Tensor below = of.target - of.reference;
  const at::Tensor log_sum = (of.others + below.expm1()).log1p_();  // lse - reference
  const at::Tensor p_target = (below - log_sum).exp_();
  const at::Tensor of_target = (p_target * nll).masked_fill_(p_target == 0, 0);
  return (of.moment + log_sum * of.others) * log_sum.neg().exp_() + of_target;
}

/// The rows as what the losses are made of.
inline CrossEntropyRows rows_of_vocabulary(const VocabularyRows& of, const CrossEntropySettings& settings,
                                           const CrossEntropyPositions& positions, int64_t vocab_size) {
  CrossEntropyRows rows;
  rows.nll = plain::loss_of_log_odds(of.others.log() + (of.reference - of.target));
  const at::Tensor log_sum = (of.others + (of.target - of.reference).exp_()).log_();
  rows.log_sum_exp = log_sum + of.reference;
  rows.likelihood_loss = rows.nll;
  if (of.target_weight.defined()) {
    rows.likelihood_loss = (of.target_weight * rows.nll).masked_fill_(of.target_weight == 0, 0);
  }
  if (settings.label_smoothing > 0) {
    // Classes that all weigh 0 have no part in it, whatever the logits are.
    const at::Tensor spread = (of.surprise + of.weight * log_sum).masked_fill_(of.weight == 0, 0);
    rows.likelihood_loss = plain::smoothed_loss(rows.likelihood_loss, spread, settings, vocab_size);
  }
  if (of.moment.defined()) rows.entropy = plain::without_left_out(entropy_of_vocabulary(of, rows.nll), positions);
  if (of.prediction.defined()) rows.prediction = of.prediction;
  rows.log_sum_exp = plain::without_left_out(rows.log_sum_exp, positions);
  const bool is_nll = rows.nll.is_same(rows.likelihood_loss);
  rows.nll = plain::without_left_out(rows.nll, positions);
  rows.likelihood_loss = is_nll ? rows.nll : plain::without_left_out(rows.likelihood_loss, positions);
  return rows;
}

/// What the gradient of a rank's columns is made of, [N] in float64 without upstream: saved for backward.
struct ShardGradient {
  at::Tensor maximum;               ///< of the columns here without the target's, or 0 if that is -inf
  at::Tensor share_of_maximum;      ///< probability of a class with that logit
  at::Tensor others_share;          ///< probability of all classes but the target
  at::Tensor target_share;          ///< probability of the target
  at::Tensor of_target, of_others;  ///< of the loss: coefficients of the target's and of all other surprises
  at::Tensor of_each;               ///< coefficient of a class of weight 1; undefined without label smoothing
  at::Tensor is_zero;               ///< bool: the row's gradient is 0, whatever its logits; undefined if for none

  std::vector<at::Tensor*> tensors() {
    return {&maximum, &share_of_maximum, &others_share, &target_share, &of_target, &of_others, &of_each, &is_zero};
  }
};

inline ShardGradient shard_gradient(const ShardRows& here, const VocabularyRows& all, const CrossEntropyRows& rows,
                                    const CrossEntropySettings& settings, const CrossEntropyPositions& positions,
                                    int64_t vocab_size) {
  ShardGradient of;
  of.maximum = finite_or_zero(here.maximum);
  // Not by way of lse, which is as large as the logits: exp(x - lse) would have none of the digits that lse is short of.
  const at::Tensor target = (all.target - all.reference).exp_(), sum = all.others + target;
  of.share_of_maximum = (here.maximum - all.reference).exp_() / sum;
  of.others_share = all.others / sum;
  of.target_share = target / sum;
  const at::Tensor likelihood = positions.token_weight * positions.scales[scale_of_likelihood];
  const at::Tensor weighted = all.target_weight.defined() ? likelihood * all.target_weight : likelihood;
  of.of_target = weighted;
  of.of_others = at::zeros_like(weighted);
  if (settings.label_smoothing > 0) {
    const double share = settings.label_smoothing / static_cast<double>(vocab_size);
    of.of_each = likelihood * share;
    of.of_target = weighted * (1 - settings.label_smoothing + share);
    of.of_others = of.of_each * all.weight - weighted * share;
  }
  if (settings.z_loss > 0) {
    of.of_others =
        of.of_others + positions.token_weight * positions.scales[scale_of_z] * rows.log_sum_exp * (2 * settings.z_loss);
  }
  of.is_zero = positions.left_out;
  if (all.target_weight.defined() && !(settings.label_smoothing > 0) && !(settings.z_loss > 0)) {
    of.is_zero = of.is_zero | (all.target_weight == 0);
  }
  if (of.is_zero.device().is_cpu() && !of.is_zero.any().item<bool>()) of.is_zero.reset();
  return of;
}

/// The gradient of a block of this rank's columns into `gradient`, which may be the block itself; `of` and upstream
/// ([rows] or 0-dim, float64) are the block's.
inline void write_shard_gradient(const at::Tensor& block, const ShardTargets& targets, const ShardGradient& of,
                                 const CrossEntropySettings& settings, const at::Tensor& upstream,
                                 const at::Tensor& gradient) {
  const at::Tensor logits = plain::arithmetic_logits(block, settings.softcap);
  const auto type = logits.scalar_type();
  const at::Tensor cap_derivative =
      settings.softcap > 0 ? plain::softcap_derivative(block, settings.softcap) : at::Tensor();
  const auto column = [&](const at::Tensor& values) { return values.to(type).unsqueeze(1); };
  const at::Tensor factor = of.share_of_maximum * (of.of_target + of.of_others) * upstream;
  const at::Tensor at_target = (of.of_others * of.target_share - of.of_target * of.others_share) * upstream;
  at::Tensor values = gradient.scalar_type() == type ? gradient : at::empty(gradient.sizes(), logits.options());
  // A target here is above the maximum of the others by any amount: its own entry is written over.
  at::sub_out(values, logits, column(of.maximum));
  values.exp_().mul_(column(factor));
  if (of.of_each.defined()) {
    const at::Tensor each = column(of.of_each * upstream);
    values.sub_(settings.class_weight.defined() ? each * settings.class_weight : each);
  }
  values.scatter_(1, targets.column, at::where(targets.is_here, column(at_target), values.gather(1, targets.column)));
  if (cap_derivative.defined()) values.mul_(cap_derivative);
  if (of.is_zero.defined()) values.masked_fill_(of.is_zero.unsqueeze(1), 0);
  if (!values.is_same(gradient)) gradient.copy_(values);
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
