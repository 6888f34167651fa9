/// Cross entropy in LibTorch operations: any device, any strides, and what the tests compare the vector kernels with.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/plain/elementwise.hpp"
#include "free_transformer/detail/plain/row_blocks.hpp"
#include "free_transformer/detail/plain/softmax_minus_target.hpp"
#include "free_transformer/detail/positions.hpp"
#include "free_transformer/detail/settings.hpp"

FREE_TRANSFORMER_SMALL_CODE_BEGIN
namespace free_transformer::FREE_TRANSFORMER_DETAIL::plain {

/// Values, or rows of them, with 0 where a position is left out: a product with 0 would let a NaN through.
inline at::Tensor without_left_out(const at::Tensor& values, const CrossEntropyPositions& positions) {
  if (!positions.left_out.defined()) return values;
  return values.masked_fill(values.dim() == 2 ? positions.left_out.unsqueeze(1) : positions.left_out, 0);
}

/// The scales of a mean over positions that each weigh 0 or 1, on a device: their number, at least 1, divides.
inline at::Tensor scales_of_counts(const at::Tensor& token_weight) {
  at::Tensor scales =
      at::empty({reconstruction_scale_count}, token_weight.options().dtype(widest_type(token_weight.device())));
  at::Tensor factors = scales.narrow(0, scale_of_likelihood, 2), weights = scales.narrow(0, weight_of_likelihood, 2);
  at::sum_out(weights, token_weight.expand({2, token_weight.size(0)}), -1, /*keepdim=*/false, scales.scalar_type());
  at::clamp_min_out(factors, weights, 1);
  factors.reciprocal_();
  return scales;
}

/// See `ReconstructionScale`.
inline at::Tensor reconstruction_scales(const CrossEntropyPositions& positions, const Normalization& normalization) {
  const at::Tensor& u = positions.token_weight;
  const auto wide = widest_type(u.device());
  const at::Tensor counted = ordered_sum(u, wide), of_z = loss_scale(normalization, counted, counted);
  if (!positions.target_weight.defined()) return at::stack({of_z, of_z, counted, counted});
  const at::Tensor weight = ordered_sum(u * positions.target_weight, wide);
  return at::stack({loss_scale(normalization, weight, counted), of_z, weight, counted});
}

inline CrossEntropyPositions cross_entropy_positions(const CrossEntropySettings& settings, int64_t classes,
                                                     at::ScalarType type, const Normalization& normalization) {
  CrossEntropyPositions positions;
  const at::Tensor& targets = settings.targets;
  positions.left_out = left_out_positions(targets, settings.ignore_index, settings.token_weight);
  if (settings.has_probabilities()) {
    positions.token_weight = settings.token_weight.defined()
                                 ? settings.token_weight
                                 : at::ones({targets.size(0)}, targets.options().dtype(type));
  } else {
    positions.class_index = targets.clamp(0, classes - 1);
    if (settings.class_weight.defined()) {
      positions.target_weight = settings.class_weight.gather(0, positions.class_index);
    }
    // Reading the targets would stall a device's stream, so a wrong one must show in the result: 0/0 is a NaN that
    // LibTorch makes, as under -ffast-math this unit has none.
    const at::Tensor is_in_range = positions.class_index == targets;
    at::Tensor weight = at::empty(targets.sizes(), targets.options().dtype(type));
    at::div_out(weight, is_in_range, is_in_range);
    if (settings.token_weight.defined()) weight.mul_(settings.token_weight);
    positions.token_weight = weight.masked_fill_(positions.left_out, 0);
    const bool is_mean =
        normalization.reduction == ReductionKind::mean && !normalization.number && !normalization.tensor.defined();
    positions.has_weights =
        targets.device().is_cpu() || settings.token_weight.defined() || !has_no_options(settings) || !is_mean;
  }
  positions.scales = positions.has_weights ? reconstruction_scales(positions, normalization)
                                           : scales_of_counts(positions.token_weight);
  return positions;
}

/// The logits of a block in the type of arithmetic, capped.
inline at::Tensor arithmetic_logits(const at::Tensor& block, double softcap) {
  const at::Tensor logits = block.to(arithmetic_type(block.scalar_type()));
  return softcap > 0 ? (logits / softcap).tanh_().mul_(softcap) : logits;
}

/// Derivative of the cap, 1 - tanh^2, in a form that keeps its digits where tanh is near 1.
inline at::Tensor softcap_derivative(const at::Tensor& block, double softcap) {
  const at::Tensor decay = (magnitude(block.to(arithmetic_type(block.scalar_type()))) * (-2 / softcap)).exp_();
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

/// The loss of the target and `spread`, the sum of those of all classes, mixed. A target without a share may be impossible.
inline at::Tensor smoothed_loss(const at::Tensor& of_target, const at::Tensor& spread,
                                const CrossEntropySettings& settings, int64_t classes) {
  const at::Tensor of_all = spread * (settings.label_smoothing / static_cast<double>(classes));
  return settings.label_smoothing < 1 ? of_target * (1 - settings.label_smoothing) + of_all : of_all;
}

/// sum_c weight_c surprise_c over a row, where a class of weight 0 may be impossible (surprise infinite).
inline at::Tensor weighted_surprise(const at::Tensor& weight, const at::Tensor& surprise) {
  return sum_of_rows((weight * surprise).masked_fill_(weight == 0, 0));
}

/// The softmax of a block of logits around a class of each row: its target, or the most likely class where the targets are
/// probabilities. A sum that leaves this pivot out keeps the relative accuracy of a confident model, and p_pivot / total
/// the accuracy that LibTorch's own sum may lack.
struct PivotedSoftmax {
  at::Tensor logits;               ///< [rows, V], capped, in the type of arithmetic
  at::Tensor maximum, prediction;  ///< [rows, 1]
  at::Tensor pivot;                ///< [rows, 1], its class
  at::Tensor probabilities;        ///< [rows, V], 0 at the pivot
  at::Tensor p_pivot, others;      ///< [rows, 1], and the sum of the other probabilities
  at::Tensor below;                ///< [rows, 1], x_pivot - maximum
  at::Tensor log_sum;              ///< [rows, 1], log sum_j exp(x_j - maximum)

  at::Tensor total() const { return others + p_pivot; }
};

/// `room`, if it is defined, is where the probabilities go.
inline PivotedSoftmax pivoted_softmax(const at::Tensor& block, double softcap, const at::Tensor& class_index,
                                      at::Tensor room) {
  PivotedSoftmax of;
  of.logits = arithmetic_logits(block, softcap);
  std::tie(of.maximum, of.prediction) = of.logits.max(-1, /*keepdim=*/true);
  of.pivot = class_index.defined() ? class_index.unsqueeze(1) : of.prediction;
  of.probabilities =
      room.defined() ? at::_softmax_out(room, of.logits, -1, /*half_to_float=*/false) : of.logits.softmax(-1);
  const at::Tensor p_maximum = of.probabilities.gather(1, of.prediction);
  of.p_pivot = class_index.defined() ? of.probabilities.gather(1, of.pivot) : p_maximum;
  of.probabilities.scatter_(1, of.pivot, 0);
  of.others = sum_of_rows(of.probabilities).unsqueeze(1);
  of.below = of.logits.gather(1, of.pivot).sub_(of.maximum);
  of.log_sum = (of.others / p_maximum).add_(of.below.expm1()).log1p_();
  return of;
}

/// The losses of a block's rows.
inline CrossEntropyRows rows_of_block(const PivotedSoftmax& of, const CrossEntropySettings& settings,
                                      const CrossEntropyPositions& positions, const WantedOfRows& wanted) {
  CrossEntropyRows rows;
  const auto flat = [](const at::Tensor& values) { return values.squeeze(1); };
  const bool is_weighted = settings.class_weight.defined() || settings.label_smoothing > 0;
  // maximum - x before log_sum is added: lse - x would lose the digits to a large offset that all logits share.
  const auto surprise = [&] { return (of.maximum - of.logits).add_(of.log_sum); };
  if (settings.has_probabilities()) {
    const at::Tensor probabilities = settings.targets.to(of.logits.scalar_type()), surprises = surprise();
    rows.nll = weighted_surprise(probabilities, surprises);
    rows.likelihood_loss =
        is_weighted
            ? weighted_surprise(smoothed_probabilities(probabilities, settings, probabilities.scalar_type()), surprises)
            : rows.nll;
  } else {
    rows.nll = flat(of.log_sum - of.below);
    rows.likelihood_loss = rows.nll;
    if (positions.target_weight.defined()) {
      rows.likelihood_loss = (positions.target_weight * rows.nll).masked_fill_(positions.target_weight == 0, 0);
    }
    if (settings.label_smoothing > 0) {
      const at::Tensor spread = settings.class_weight.defined() ? weighted_surprise(settings.class_weight, surprise())
                                                                : sum_of_rows(surprise());
      rows.likelihood_loss = smoothed_loss(rows.likelihood_loss, spread, settings, of.logits.size(1));
    }
  }
  if (wanted.each || settings.z_loss > 0) rows.log_sum_exp = flat(of.maximum + of.log_sum);
  if (wanted.prediction) rows.prediction = flat(of.prediction);
  if (wanted.entropy) {  // -log p_c = log_sum + maximum - x_c: no term is negative, and none cancels
    const at::Tensor of_pivot = (of.p_pivot * of.below).masked_fill_(of.p_pivot == 0, 0);
    const at::Tensor of_others = weighted_surprise(of.probabilities, of.maximum - of.logits);
    rows.entropy = flat(of.log_sum) + (of_others - flat(of_pivot)) / flat(of.total());
  }
  return rows;
}

/// Turns the probabilities into the gradient of their logits. In general total_coefficient p_c - coefficient_c, which for
/// the pivot is (total_coefficient - coefficient) p - coefficient (1 - p): neither a small p nor a small 1 - p is a
/// difference. `scale` is what each part of a position's loss is multiplied by: its weight is applied here.
inline at::Tensor gradient_of_block(const PivotedSoftmax& of, const at::Tensor& block, const at::Tensor& log_sum_exp,
                                    const CrossEntropySettings& settings, const CrossEntropyPositions& positions,
                                    const at::Tensor& likelihood_scale, const at::Tensor& z_scale) {
  const auto column = [](const at::Tensor& values) { return values.unsqueeze(1); };
  const auto type = of.logits.scalar_type();
  const at::Tensor likelihood = positions.token_weight * likelihood_scale;
  const double share = settings.label_smoothing / static_cast<double>(of.logits.size(1));
  at::Tensor coefficients, of_pivot, beside;  // of every class; of the pivot; summed over the other classes, if not 0
  if (settings.has_probabilities()) {
    coefficients = smoothed_probabilities(settings.targets, settings, type) * column(likelihood);
    of_pivot = coefficients.gather(1, of.pivot);
    beside = column(sum_of_rows(coefficients.scatter(1, of.pivot, 0)));
  } else {
    of_pivot = column(positions.target_weight.defined() ? likelihood * positions.target_weight : likelihood);
    if (settings.label_smoothing > 0) {
      const at::Tensor spread = column(likelihood * share);
      const at::Tensor weight =
          settings.class_weight.defined() ? settings.class_weight : at::ones({of.logits.size(1)}, of.logits.options());
      const at::Tensor at_pivot = spread * weight.gather(0, of.pivot.squeeze(1)).unsqueeze(1);
      of_pivot = of_pivot * (1 - settings.label_smoothing) + at_pivot;
      coefficients = spread * weight;
      beside = spread * ordered_sum(weight, type) - at_pivot;
    }
  }
  if (settings.z_loss > 0) {
    const at::Tensor of_z = column(positions.token_weight * z_scale * log_sum_exp * (2 * settings.z_loss));
    beside = beside.defined() ? beside + of_z : of_z;
  }
  const at::Tensor inverse = of.total().reciprocal_();
  at::Tensor gradient = of.probabilities, at_pivot = of.others * (of_pivot * inverse).neg_();
  gradient.mul_((beside.defined() ? of_pivot + beside : of_pivot) * inverse);
  if (coefficients.defined()) gradient.sub_(coefficients);
  if (beside.defined()) at_pivot.add_(beside * (of.p_pivot * inverse));
  gradient.scatter_(1, of.pivot, at_pivot);
  if (settings.softcap > 0) gradient.mul_(softcap_derivative(block, settings.softcap));
  if (positions.left_out.defined()) gradient.masked_fill_(column(positions.left_out), 0);
  const bool has_no_loss = positions.target_weight.defined() && !beside.defined();  // whatever its logits
  if (has_no_loss) gradient.masked_fill_(column(positions.target_weight == 0), 0);
  return gradient;
}

/// sum_t u_t value_t. Without weights the values are 0 where a position is left out.
inline at::Tensor weighted_sum(const at::Tensor& values, const CrossEntropyPositions& positions) {
  const auto wide = widest_type(values.device());
  if (!positions.has_weights) return ordered_sum(values, wide);
  const at::Tensor weighted = positions.token_weight * values;
  if (positions.left_out.defined()) weighted.masked_fill_(positions.left_out, 0);
  return ordered_sum(weighted, wide);
}

/// True where the most likely class is the target, or the most likely class of the target's probabilities. Where the loss is
/// NaN no class is the most likely one.
inline at::Tensor hits(const CrossEntropyRows& rows, const CrossEntropySettings& settings,
                       const CrossEntropyPositions& positions) {
  const at::Tensor hit =
      rows.prediction == (settings.has_probabilities() ? settings.targets.argmax(-1) : positions.class_index);
  return without_left_out(hit & rows.nll.eq(rows.nll), positions);
}

/// See `ReconstructionSum`.
inline at::Tensor reconstruction_sums(const CrossEntropyRows& rows, const CrossEntropySettings& settings,
                                      const CrossEntropyPositions& positions) {
  const at::Tensor none = at::zeros({}, positions.scales.options());
  const at::Tensor likelihood = weighted_sum(rows.likelihood_loss, positions);
  const bool is_nll = rows.nll.is_same(rows.likelihood_loss);
  return at::stack({likelihood, positions.scales[weight_of_likelihood],
                    settings.z_loss > 0 ? weighted_sum(rows.log_sum_exp.square(), positions) * settings.z_loss : none,
                    positions.scales[weight_of_tokens], is_nll ? likelihood : weighted_sum(rows.nll, positions),
                    rows.prediction.defined() ? weighted_sum(hits(rows, settings, positions), positions) : none});
}

/// The rows of blocks as those of the whole.
inline CrossEntropyRows joined(const std::vector<CrossEntropyRows>& blocks, const at::TensorOptions& options) {
  if (blocks.empty()) {
    const at::Tensor none = at::empty({0}, options);
    return {none, none, none, none.to(at::kLong), none};
  }
  const auto join = [&](at::Tensor CrossEntropyRows::*values) {
    std::vector<at::Tensor> parts;
    parts.reserve(blocks.size());
    for (const auto& block : blocks) parts.push_back(block.*values);
    if (parts.size() == 1 || !parts[0].defined()) return parts[0];
    return at::cat(parts);
  };
  const bool is_nll = blocks[0].nll.is_same(blocks[0].likelihood_loss);
  const at::Tensor nll = join(&CrossEntropyRows::nll);
  return {nll, is_nll ? nll : join(&CrossEntropyRows::likelihood_loss), join(&CrossEntropyRows::log_sum_exp),
          join(&CrossEntropyRows::prediction), join(&CrossEntropyRows::entropy)};
}

/// See `cross_entropy_rows`, for those that take few operations. An unscaled gradient is in the type of arithmetic.
inline CrossEntropyRows all_rows_in_few_operations(const at::Tensor& logits, const CrossEntropyPositions& positions,
                                                   const at::Tensor& gradient, const at::Tensor& upstream,
                                                   const WantedOfRows& wanted) {
  const auto type = arithmetic_type(logits.scalar_type());
  const bool is_written_at_once = gradient.defined() && gradient.scalar_type() == type && !gradient.is_same(logits);
  const bool is_finished = gradient.defined() && !wanted.unscaled_gradient;
  at::Tensor rows_of_gradient, factor;
  if (gradient.defined()) rows_of_gradient = gradient.view({-1, logits.size(-1)});
  if (is_finished) factor = gradient_factor(positions, upstream);
  std::vector<CrossEntropyRows> blocks;
  for_each_row_block(logits, 0, [&](const at::Tensor& block, int64_t first) {
    const auto part = [&](const at::Tensor& all) { return all.narrow(0, first, block.size(0)); };
    at::Tensor softmax;
    if (is_written_at_once) softmax = part(rows_of_gradient);
    if (gradient.defined() && !is_written_at_once) softmax = at::empty(block.sizes(), block.options().dtype(type));
    blocks.push_back(rows_in_few_operations(block, part(positions.class_index), softmax, wanted));
    if (is_finished) {
      finish_gradient(softmax, part_of(positions, part), factor.dim() == 0 ? factor : part(factor),
                      part(rows_of_gradient));
    }
  });
  CrossEntropyRows rows = joined(blocks, logits.options().dtype(type));
  rows.nll.masked_fill_(positions.left_out, 0);
  rows.likelihood_loss = rows.nll;
  if (rows.prediction.defined()) rows.prediction = without_left_out(rows.prediction, positions);
  return rows;
}

/// All rows, and their gradient if `gradient` is defined: contiguous, of the logits' shape and type; it may be the
/// logits. upstream is [N] in the type of arithmetic and multiplies the scales, or undefined.
inline CrossEntropyOfRows cross_entropy_rows(const at::Tensor& logits, const CrossEntropySettings& settings,
                                             const CrossEntropyPositions& positions, const at::Tensor& gradient,
                                             const at::Tensor& upstream, const WantedOfRows& wanted) {
  if (takes_few_operations(logits, settings, wanted) && !wanted.each) {  // each position's loss to its last digits
    CrossEntropyOfRows result;
    result.rows = all_rows_in_few_operations(logits, positions, gradient, upstream, wanted);
    if (wanted.sums) result.sums = reconstruction_sums(result.rows, settings, positions);
    return result;
  }
  const auto type = arithmetic_type(logits.scalar_type());
  const bool is_written_at_once = gradient.defined() && gradient.scalar_type() == type && !gradient.is_same(logits);
  at::Tensor likelihood, z, gradient_rows;  // what the parts of each position's loss are multiplied by
  if (gradient.defined()) {
    gradient_rows = gradient.view({-1, logits.size(-1)});
    const at::Tensor scales = positions.scales.to(type);
    likelihood = scales[scale_of_likelihood].expand(settings.targets.size(0));
    z = scales[scale_of_z].expand(settings.targets.size(0));
    if (upstream.defined()) likelihood = upstream * likelihood, z = upstream * z;
  }
  std::vector<CrossEntropyRows> blocks;
  for_each_row_block(logits, 0, [&](const at::Tensor& block, int64_t first) {
    const auto part = [&](const at::Tensor& all) { return all.narrow(0, first, block.size(0)); };
    const auto of_settings = part_of(settings, part);
    const auto of_positions = part_of(positions, part);
    const auto softmax = pivoted_softmax(block, settings.softcap, of_positions.class_index,
                                         is_written_at_once ? part(gradient_rows) : at::Tensor());
    CrossEntropyRows rows = rows_of_block(softmax, of_settings, of_positions, wanted);
    if (gradient.defined()) {
      const at::Tensor of_block =
          gradient_of_block(softmax, block, rows.log_sum_exp, of_settings, of_positions, part(likelihood), part(z));
      if (!is_written_at_once) part(gradient_rows).copy_(of_block);
    }
    blocks.push_back(std::move(rows));
  });
  CrossEntropyOfRows result;
  result.rows = joined(blocks, logits.options().dtype(type));
  CrossEntropyRows& rows = result.rows;
  if (wanted.each || wanted.prediction || wanted.entropy) {
    const bool is_nll = rows.nll.is_same(rows.likelihood_loss);
    if (wanted.each && !settings.has_probabilities()) {  // a target out of range shows, here too
      const at::Tensor zero = positions.token_weight * 0;
      rows.nll = rows.nll + zero;
      if (!is_nll) rows.likelihood_loss = rows.likelihood_loss + zero;
    }
    for (at::Tensor* values : {&rows.nll, &rows.likelihood_loss, &rows.log_sum_exp, &rows.prediction, &rows.entropy}) {
      const bool is_copied = values == &rows.likelihood_loss && is_nll;
      if (values->defined()) *values = is_copied ? rows.nll : without_left_out(*values, positions);
    }
  }
  if (wanted.sums) result.sums = reconstruction_sums(rows, settings, positions);
  return result;
}

/// The same gradient as a differentiable expression of logits and upstream ([N] or 0-dim), for a backward through the
/// backward. It holds several tensors of the logits' size.
inline at::Tensor differentiable_cross_entropy_gradient(const at::Tensor& logits, const CrossEntropySettings& settings,
                                                        const CrossEntropyPositions& known,
                                                        const at::Tensor& upstream) {
  const int64_t classes = logits.size(-1);
  const auto type = arithmetic_type(logits.scalar_type());
  const auto column = [](const at::Tensor& values) { return values.unsqueeze(1); };
  const bool is_complete = known.token_weight.defined();  // kernels leave the scales alone
  auto positions = is_complete ? known : cross_entropy_positions(settings, classes, type, Normalization());
  if (positions.target_weight.defined() && !(settings.label_smoothing > 0 || settings.z_loss > 0)) {
    const at::Tensor has_no_loss = positions.target_weight == 0;  // whatever its logits
    positions.left_out = positions.left_out.defined() ? positions.left_out | has_no_loss : has_no_loss;
  }
  const at::Tensor weighted = upstream * positions.token_weight, scales = known.scales.to(type);
  const at::Tensor likelihood = weighted * scales[scale_of_likelihood];
  at::Tensor x = without_left_out(logits.reshape({-1, classes}).to(type), positions);
  at::Tensor cap_derivative;
  if (settings.softcap > 0) {
    const at::Tensor tanh = (x / settings.softcap).tanh();
    cap_derivative = 1 - tanh.square();
    x = tanh * settings.softcap;
  }
  at::Tensor coefficients;
  if (settings.has_probabilities()) {
    const at::Tensor probabilities = smoothed_probabilities(settings.targets, settings, type);
    coefficients = without_left_out(probabilities, positions) * column(likelihood);
  } else {
    coefficients = at::zeros_like(x).scatter_(1, column(positions.class_index), 1 - settings.label_smoothing) +
                   settings.label_smoothing / static_cast<double>(classes);
    if (settings.class_weight.defined()) coefficients = coefficients * settings.class_weight;
    coefficients = coefficients * column(likelihood);
  }
  at::Tensor total = coefficients.sum(-1);
  if (settings.z_loss > 0) total = total + weighted * scales[scale_of_z] * x.logsumexp(-1) * (2 * settings.z_loss);
  at::Tensor gradient = column(total) * x.softmax(-1) - coefficients;
  if (settings.softcap > 0) gradient = gradient * cap_derivative;
  return without_left_out(gradient, positions).to(logits.scalar_type()).reshape(logits.sizes());
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::plain
FREE_TRANSFORMER_SMALL_CODE_END
