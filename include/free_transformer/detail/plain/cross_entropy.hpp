/// Cross entropy in LibTorch operations: any device, any strides, and what the tests compare the vector kernels with.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/plain/row_blocks.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::plain {

/// What the targets alone say of each position, [N].
struct CrossEntropyPositions {
  at::Tensor counted;        ///< bool: neither ignored nor of weight 0
  at::Tensor token_weight;   ///< u, 0 where not counted; NaN where the target is out of range
  at::Tensor class_index;    ///< the target, 0 where there is none; undefined for probabilities
  at::Tensor target_weight;  ///< w_y, 1 for probabilities
};

inline CrossEntropyPositions cross_entropy_positions(const CrossEntropySettings& settings, int64_t classes,
                                                     at::ScalarType type) {
  CrossEntropyPositions positions;
  const int64_t rows = settings.targets.size(0);
  const auto options = settings.targets.options().dtype(type);
  positions.token_weight = settings.token_weight.defined() ? settings.token_weight : at::ones({rows}, options);
  positions.counted = positions.token_weight != 0;
  positions.target_weight = at::ones({1}, options).expand({rows});
  if (!settings.has_probabilities()) {
    positions.counted = positions.counted & (settings.targets != settings.ignore_index);
    const at::Tensor in_range = (settings.targets >= 0) & (settings.targets < classes);
    positions.class_index = settings.targets.masked_fill(~(in_range & positions.counted), 0);
    // Reading the targets would stall a device's stream, so a wrong one must show in the result, as a NaN that LibTorch
    // makes: under -ffast-math this unit has none.
    positions.token_weight = positions.token_weight + (in_range.to(type) - 1).sqrt_();
    if (settings.class_weight.defined()) {
      positions.target_weight = settings.class_weight.index_select(0, positions.class_index);
    }
  }
  positions.token_weight = positions.token_weight.masked_fill(~positions.counted, 0);
  return positions;
}

/// What the losses of all positions are multiplied by on their way to the final value: 0-dim, in the widest type.
struct LossScales {
  at::Tensor likelihood, z;
};

inline LossScales loss_scales(const CrossEntropyPositions& positions, const Normalization& normalization) {
  const at::Tensor& u = positions.token_weight;
  const at::Tensor sums = ordered_sum(at::stack({u * positions.target_weight, u}).to(widest_type(u.device())));
  return {loss_scale(normalization, sums[0], sums[1]), loss_scale(normalization, sums[1], sums[1])};
}

/// With the largest logit as the pivot: sums that leave it out keep the relative accuracy of a confident model.
struct PivotedRows : CrossEntropyRows {
  at::Tensor maximum;  ///< [N], the largest logit; `prediction` is its class
  at::Tensor others;   ///< [N], sum of exp(x_j - maximum) over the other classes
};

/// The logits of a block in the type of arithmetic, capped.
inline at::Tensor arithmetic_logits(const at::Tensor& block, double softcap) {
  const at::Tensor logits = block.to(arithmetic_type(block.scalar_type()));
  return softcap > 0 ? (logits / softcap).tanh_().mul_(softcap) : logits;
}

/// Derivative of the cap, 1 - tanh^2, in a form that keeps its digits where tanh is near 1.
inline at::Tensor softcap_derivative(const at::Tensor& block, double softcap) {
  const at::Tensor decay = (block.to(arithmetic_type(block.scalar_type())).abs() * (-2 / softcap)).exp_();
  return 4 * decay / (1 + decay).square_();
}

/// Coefficient of lse - x_c for every class of a block of class probabilities, [rows, V].
inline at::Tensor smoothed_probabilities(const at::Tensor& probabilities, const CrossEntropySettings& settings,
                                         at::ScalarType type) {
  at::Tensor smoothed = probabilities.to(type);
  if (settings.label_smoothing > 0) {
    const double share = settings.label_smoothing / static_cast<double>(probabilities.size(1));
    smoothed = smoothed * (1 - settings.label_smoothing) + share;
  }
  return settings.class_weight.defined() ? smoothed * settings.class_weight : smoothed;
}

/// sum_c weight_c surprise_c over a row, where a class of weight 0 may be impossible (surprise infinite).
inline at::Tensor weighted_surprise(const at::Tensor& weight, const at::Tensor& surprise) {
  return sum_of_rows((weight * surprise).masked_fill_(weight == 0, 0));
}

inline PivotedRows cross_entropy_rows(const at::Tensor& logits, const CrossEntropySettings& settings,
                                      const CrossEntropyPositions& positions, bool with_entropy) {
  const auto type = arithmetic_type(logits.scalar_type());
  const int64_t classes = logits.size(-1);
  const auto options = logits.options().dtype(type);
  const auto empty = [&](at::ScalarType of_type) {
    return at::empty({settings.targets.size(0)}, options.dtype(of_type));
  };
  PivotedRows rows{{empty(type), empty(type), empty(type), empty(at::kLong), with_entropy ? empty(type) : at::Tensor()},
                   empty(type),
                   empty(type)};
  for_each_row_block(logits, 0, [&](const at::Tensor& block, int64_t first) {
    const auto part = [&](const at::Tensor& all) { return all.narrow(0, first, block.size(0)); };
    const at::Tensor x = arithmetic_logits(block, settings.softcap);
    const auto [maximum, pivot] = x.max(-1, /*keepdim=*/true);
    const at::Tensor exponentials = (x - maximum).exp_();
    const at::Tensor others = sum_of_rows(exponentials.scatter(1, pivot, 0));
    const at::Tensor log_sum = others.log1p();
    if (with_entropy) {  // -log p_c = log_sum + m - x_c: no term is negative, and none cancels
      part(rows.entropy).copy_(log_sum + weighted_surprise(exponentials, maximum - x) / (1 + others));
    }
    at::Tensor nll, likelihood_loss;
    // m - x before log_sum is added: lse - x would lose the digits to a large offset that all logits share.
    if (settings.has_probabilities()) {
      const at::Tensor surprise = (maximum - x).add_(log_sum.unsqueeze(1));
      const at::Tensor probabilities = part(settings.targets).to(type);
      nll = weighted_surprise(probabilities, surprise);
      likelihood_loss = settings.class_weight.defined() || settings.label_smoothing > 0
                            ? weighted_surprise(smoothed_probabilities(probabilities, settings, type), surprise)
                            : nll;
    } else {
      const at::Tensor target_weight = part(positions.target_weight);
      nll = (maximum - x.gather(1, part(positions.class_index).unsqueeze(1))).squeeze(1) + log_sum;
      likelihood_loss = (target_weight * nll).masked_fill_(target_weight == 0, 0) * (1 - settings.label_smoothing);
      if (settings.label_smoothing > 0) {
        const at::Tensor surprise = (maximum - x).add_(log_sum.unsqueeze(1));
        likelihood_loss += (settings.class_weight.defined() ? weighted_surprise(settings.class_weight, surprise)
                                                            : sum_of_rows(surprise)) *
                           (settings.label_smoothing / static_cast<double>(classes));
      }
    }
    part(rows.prediction).copy_(pivot.squeeze(1));
    part(rows.maximum).copy_(maximum.squeeze(1));
    part(rows.log_sum_exp).copy_(maximum.squeeze(1) + log_sum);
    part(rows.others).copy_(others);
    part(rows.nll).copy_(nll);
    part(rows.likelihood_loss).copy_(likelihood_loss);
  });
  const at::Tensor left_out = ~positions.counted;
  for (at::Tensor* values : {&rows.nll, &rows.likelihood_loss, &rows.log_sum_exp, &rows.prediction, &rows.maximum,
                             &rows.others, &rows.entropy}) {
    if (values->defined()) values->masked_fill_(left_out, 0);
  }
  return rows;
}

/// Loss of each position, [N]: the likelihood part and the z-loss part, which a mean divides by different weights.
struct CrossEntropyLosses {
  at::Tensor likelihood;
  at::Tensor z;  ///< undefined without z-loss

  at::Tensor sum() const { return z.defined() ? likelihood + z : likelihood; }
};

inline CrossEntropyLosses cross_entropy_losses(const CrossEntropyRows& rows, const CrossEntropySettings& settings,
                                               const CrossEntropyPositions& positions) {
  const auto weighted = [&](const at::Tensor& values) {
    return (positions.token_weight * values).masked_fill_(~positions.counted, 0);
  };
  CrossEntropyLosses losses{weighted(rows.likelihood_loss), {}};
  if (settings.z_loss > 0) losses.z = weighted(rows.log_sum_exp.square()) * settings.z_loss;
  return losses;
}

/// True where the most likely class is the target, or the most likely class of the target's probabilities.
inline at::Tensor hits(const CrossEntropyRows& rows, const CrossEntropySettings& settings,
                       const CrossEntropyPositions& positions) {
  const at::Tensor wanted = settings.has_probabilities() ? settings.targets.argmax(-1) : positions.class_index;
  return (rows.prediction == wanted) & positions.counted;
}

/// The sums of `ReconstructionSum`, in its order; hits are counted only if asked for, as probabilities make them
/// costly.
inline at::Tensor reconstruction_sums(const CrossEntropyRows& rows, const CrossEntropyLosses& losses,
                                      const CrossEntropySettings& settings, const CrossEntropyPositions& positions,
                                      bool count_hits) {
  const at::Tensor& u = positions.token_weight;
  const at::Tensor none = at::zeros_like(u);
  const at::Tensor nll = (u * rows.nll).masked_fill_(~positions.counted, 0);
  return ordered_sum(at::stack({losses.likelihood, u * positions.target_weight, losses.z.defined() ? losses.z : none, u,
                                nll, count_hits ? u * hits(rows, settings, positions) : none})
                         .to(widest_type(u.device())));
}

/// The loss from its sums: the likelihood part and the z-loss have divisors of their own.
inline at::Tensor reduced_loss(const at::Tensor& sums, const Normalization& normalization) {
  const at::Tensor counted = sums[token_weight_sum];
  return sums[likelihood_loss_sum] * loss_scale(normalization, sums[likelihood_weight_sum], counted) +
         sums[z_loss_sum] * loss_scale(normalization, counted, counted);
}

/// Gradient to the logits, of their shape and type. likelihood_scale and z_scale are what each part of a position's
/// loss is multiplied by on its way to the final value: [N] or 0-dim, in the type of arithmetic.
inline at::Tensor cross_entropy_gradient(const at::Tensor& logits, const CrossEntropySettings& settings,
                                         const CrossEntropyPositions& positions, const PivotedRows& rows,
                                         const at::Tensor& likelihood_scale, const at::Tensor& z_scale) {
  const auto type = arithmetic_type(logits.scalar_type());
  const int64_t classes = logits.size(-1);
  const auto column = [](const at::Tensor& values) { return values.unsqueeze(1); };
  const at::Tensor gradient = at::empty(logits.sizes(), logits.options());
  const at::Tensor gradient_rows = gradient.view({-1, classes});

  const at::Tensor likelihood = positions.token_weight * likelihood_scale;
  const at::Tensor at_target = likelihood * positions.target_weight * (1 - settings.label_smoothing);
  const at::Tensor of_z = positions.token_weight * z_scale * rows.log_sum_exp * (2 * settings.z_loss);
  const at::Tensor spread = likelihood * (settings.label_smoothing / static_cast<double>(classes));
  at::Tensor left_out = ~positions.counted;
  if (!(settings.z_loss > 0 || settings.label_smoothing > 0)) left_out = left_out | (positions.target_weight == 0);

  for_each_row_block(logits, 0, [&](const at::Tensor& block, int64_t first) {
    const auto part = [&](const at::Tensor& all) { return all.narrow(0, first, block.size(0)); };
    const at::Tensor pivot = column(part(rows.prediction));
    const at::Tensor others = part(rows.others);
    const at::Tensor x = arithmetic_logits(block, settings.softcap);
    at::Tensor target =
        part(gradient_rows);  // written directly where no rounding is due: no memory beside the gradient
    at::Tensor g = target.scalar_type() == type ? at::sub_out(target, x, column(part(rows.maximum)))
                                                : x - column(part(rows.maximum));
    g.exp_();
    at::Tensor at_pivot, rest,
        total;  // coefficients of lse - x_c: of the pivot, summed over c != pivot, and over all c
    if (settings.has_probabilities()) {
      const at::Tensor coefficients =
          smoothed_probabilities(part(settings.targets), settings, type) * column(part(likelihood));
      total = sum_of_rows(coefficients) + part(of_z);
      rest = sum_of_rows(coefficients.scatter(1, pivot, 0)) + part(of_z);
      at_pivot = coefficients.gather(1, pivot).squeeze(1);
      g.mul_(column(total / (1 + others))).sub_(coefficients);
    } else {
      const at::Tensor class_index = part(positions.class_index);
      const at::Tensor target_part = part(at_target);
      const at::Tensor hit = class_index == part(rows.prediction);
      rest = part(of_z) + target_part.masked_fill(hit, 0);
      at_pivot = target_part.masked_fill(hit.logical_not(), 0);
      total = part(of_z) + target_part;
      if (settings.label_smoothing > 0) {
        const at::Tensor weight =
            settings.class_weight.defined() ? settings.class_weight : at::ones({classes}, x.options());
        const at::Tensor weight_sum = ordered_sum(weight);
        const at::Tensor weight_of_pivot = weight.index_select(0, part(rows.prediction));
        rest = rest + part(spread) * (weight_sum - weight_of_pivot);
        at_pivot = at_pivot + part(spread) * weight_of_pivot;
        total = total + part(spread) * weight_sum;
        g.mul_(column(total / (1 + others))).addcmul_(column(part(spread)), weight, -1);
      } else {
        g.mul_(column(total / (1 + others)));
      }
      g.scatter_add_(1, column(class_index), column(-target_part));
    }
    // total p - coefficient at the pivot, where p = 1/(1 + others): neither a small p nor a small 1 - p is a difference
    g.scatter_(1, pivot, column((rest - at_pivot * others) / (1 + others)));
    if (settings.softcap > 0) g.mul_(softcap_derivative(block, settings.softcap));
    g.masked_fill_(column(part(left_out)), 0);
    if (g.scalar_type() != target.scalar_type()) target.copy_(g);
  });
  return gradient;
}

/// The same gradient as a differentiable expression of logits and scales, for a backward through the backward. It holds
/// several tensors of the logits' size.
inline at::Tensor differentiable_cross_entropy_gradient(const at::Tensor& logits, const CrossEntropySettings& settings,
                                                        const CrossEntropyPositions& positions,
                                                        const at::Tensor& likelihood_scale, const at::Tensor& z_scale) {
  const int64_t classes = logits.size(-1);
  const auto type = arithmetic_type(logits.scalar_type());
  const auto column = [](const at::Tensor& values) { return values.unsqueeze(1); };
  const at::Tensor left_out = column(~positions.counted);
  at::Tensor x = logits.reshape({-1, classes}).to(type).masked_fill(left_out, 0);
  at::Tensor cap_derivative;
  if (settings.softcap > 0) {
    const at::Tensor tanh = (x / settings.softcap).tanh();
    cap_derivative = 1 - tanh.square();
    x = tanh * settings.softcap;
  }
  const at::Tensor likelihood = positions.token_weight * likelihood_scale;
  at::Tensor coefficients;
  if (settings.has_probabilities()) {
    coefficients = smoothed_probabilities(settings.targets, settings, type) * column(likelihood);
  } else {
    coefficients = at::zeros_like(x).scatter_(1, column(positions.class_index), 1 - settings.label_smoothing) +
                   settings.label_smoothing / static_cast<double>(classes);
    if (settings.class_weight.defined()) coefficients = coefficients * settings.class_weight;
    coefficients = coefficients * column(likelihood);
  }
  at::Tensor total = coefficients.sum(-1);
  if (settings.z_loss > 0) total = total + positions.token_weight * z_scale * x.logsumexp(-1) * (2 * settings.z_loss);
  at::Tensor gradient = column(total) * x.softmax(-1) - coefficients;
  if (settings.softcap > 0) gradient = gradient * cap_derivative;
  return gradient.masked_fill(left_out, 0).to(logits.scalar_type()).reshape(logits.sizes());
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::plain
