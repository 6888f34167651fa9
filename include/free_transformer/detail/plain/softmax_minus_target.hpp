/// Cross entropy without options on a device, where each operation is a launch: as few of them as keep the promises.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/settings.hpp"

FREE_TRANSFORMER_SMALL_CODE_BEGIN
namespace free_transformer::FREE_TRANSFORMER_DETAIL::plain {

/// True if a position's loss is its weight times its negative log-likelihood.
inline bool has_no_options(const CrossEntropySettings& settings) {
  return !settings.has_probabilities() && !settings.class_weight.defined() && settings.label_smoothing <= 0 &&
         settings.z_loss <= 0 && settings.softcap <= 0;
}

inline bool takes_few_operations(const at::Tensor& logits, const CrossEntropySettings& settings,
                                 const WantedOfRows& wanted) {
  return !logits.device().is_cpu() && has_no_options(settings) && !wanted.entropy;
}

/// log(1 + odds) from the logarithm of the odds of all other classes, which may be too large for a float. Of a small loss
/// that logarithm, l, costs |l|/2 steps, as much as the difference of the two logits has cost where it was rounded.
inline at::Tensor loss_of_log_odds(const at::Tensor& log_odds) {
  return at::softplus(log_odds, /*beta=*/1, /*threshold=*/50);
}

/// The rows of a block of logits, and softmax minus one-hot, which the weights and the scale of the loss have yet to
/// multiply, into `gradient` if it is defined: of the type of arithmetic, and not the logits. The target's entry is minus
/// the sum of the others, which keeps the relative accuracy of a confident model, as does the loss that is made of it.
inline CrossEntropyRows rows_in_few_operations(const at::Tensor& block, const at::Tensor& class_index,
                                               at::Tensor gradient, const WantedOfRows& wanted) {
  const at::Tensor logits = block.to(arithmetic_type(block.scalar_type())), target = class_index.unsqueeze(1);
  const auto [maximum, prediction] = logits.max(-1, /*keepdim=*/true);
  const at::Tensor softmax =
      gradient.defined() ? at::_softmax_out(gradient, logits, -1, /*half_to_float=*/false) : logits.softmax(-1);
  const at::Tensor p_maximum = softmax.gather(1, prediction);
  const at::Tensor below = logits.gather(1, target).sub_(maximum);  // lse - x would lose the digits to a large offset
  softmax.scatter_(1, target, 0);
  const at::Tensor others = softmax.sum(-1, /*keepdim=*/true);
  CrossEntropyRows rows;
  rows.nll = loss_of_log_odds((others / p_maximum).log_().sub_(below)).squeeze(1);
  rows.likelihood_loss = rows.nll;
  if (wanted.prediction) rows.prediction = prediction.squeeze(1);
  if (gradient.defined()) softmax.scatter_(1, target, others.neg_());
  return rows;
}

/// What softmax minus one-hot is multiplied by: 0-dim, or [N, 1]. upstream is 0-dim or [N].
inline at::Tensor gradient_factor(const CrossEntropyPositions& positions, const at::Tensor& upstream) {
  at::Tensor factor = positions.scales.select(0, scale_of_likelihood);
  if (upstream.defined()) factor = factor * upstream;
  if (positions.has_weights) factor = positions.token_weight * factor;
  return factor.dim() == 0 ? factor : factor.to(positions.token_weight.scalar_type()).unsqueeze(1);
}

/// Multiplies the rows into `gradient`, which may be the rows themselves, and leaves 0 where a position does not count.
inline void finish_gradient(const at::Tensor& rows, const CrossEntropyPositions& positions, const at::Tensor& factor,
                            at::Tensor gradient) {
  at::mul_out(gradient, rows, factor);
  gradient.masked_fill_(positions.left_out.unsqueeze(1), 0);
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::plain
FREE_TRANSFORMER_SMALL_CODE_END
