/// The door of the cross entropy: where its rows are computed.
#pragma once

#include <ATen/ATen.h>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/device/door.hpp"
#include "free_transformer/detail/kernels/cross_entropy.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/plain/cross_entropy.hpp"
#include "free_transformer/detail/positions.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

inline CrossEntropyPositions cross_entropy_positions(const at::Tensor& logits, const CrossEntropySettings& settings,
                                                     const Normalization& normalization) {
  const int64_t classes = logits.size(-1);
  const auto type = arithmetic_type(logits.scalar_type());
  if (kernels::takes_cross_entropy(logits, settings)) {
    return kernels::cross_entropy_positions(settings, classes, type, normalization);
  }
  if (device::takes_cross_entropy(logits, settings)) {
    if (auto positions = device::cross_entropy_positions(settings, classes, type, normalization)) return *positions;
  }
  return plain::cross_entropy_positions(settings, classes, type, normalization);
}

/// All rows, and their gradient if `gradient` is defined: contiguous or the logits themselves, of their shape and type.
/// upstream is [N] in the type of arithmetic and multiplies the scales, or undefined.
inline CrossEntropyOfRows cross_entropy_rows(const at::Tensor& logits, const CrossEntropySettings& settings,
                                             const CrossEntropyPositions& positions, const at::Tensor& gradient,
                                             const at::Tensor& upstream, const WantedOfRows& wanted) {
  if (kernels::takes_cross_entropy(logits, settings)) {
    return kernels::cross_entropy_rows(logits, settings, positions, gradient, upstream, wanted);
  }
  if (device::takes_cross_entropy(logits, settings)) {
    if (auto rows = device::cross_entropy_rows(logits, settings, positions, gradient, upstream, wanted)) return *rows;
  }
  if (positions.token_weight.defined()) {
    return plain::cross_entropy_rows(logits, settings, positions, gradient, upstream, wanted);
  }
  auto completed =
      plain::cross_entropy_positions(settings, logits.size(-1), arithmetic_type(logits.scalar_type()), Normalization());
  completed.scales = positions.scales;
  completed.has_weights = true;
  return plain::cross_entropy_rows(logits, settings, completed, gradient, upstream, wanted);
}

/// True if the gradient may be written over the logits.
inline bool can_overwrite(const at::Tensor& logits, const CrossEntropySettings& settings) {
  return kernels::takes_cross_entropy(logits, settings) || device::takes_cross_entropy(logits, settings);
}

/// True if the forward pass is to finish the gradient for an upstream of 1, which backward then multiplies. Where the
/// processor cannot see whether upstream is 1, that is one more pass over the gradient, and comes too late for what a half
/// type has rounded to 0: a device's kernel had better read the logits again in backward.
inline bool finishes_gradient_in_forward(const at::Tensor& logits, const CrossEntropySettings& settings) {
  const bool is_rounded = arithmetic_type(logits.scalar_type()) != logits.scalar_type();
  return logits.device().is_cpu() || !(is_rounded || device::takes_cross_entropy(logits, settings));
}

/// Loss of each position, [N], all weights applied.
inline at::Tensor losses_of_rows(const CrossEntropyRows& rows, const CrossEntropySettings& settings,
                                 const CrossEntropyPositions& positions) {
  const at::Tensor loss =
      settings.z_loss > 0 ? rows.likelihood_loss + settings.z_loss * rows.log_sum_exp.square() : rows.likelihood_loss;
  const at::Tensor& weight = positions.token_weight.defined() ? positions.token_weight : settings.token_weight;
  return weight.defined() ? loss * weight : loss;
}

/// The final value, by scales that were known before the sums.
inline at::Tensor reduced_loss(const at::Tensor& sums, const at::Tensor& scales, bool has_z_loss, at::ScalarType type) {
  if (!sums.device().is_cpu()) {
    const at::Tensor sum = sums[likelihood_loss_sum], scale = scales[scale_of_likelihood];
    if (has_z_loss) return (sum * scale + sums[z_loss_sum] * scales[scale_of_z]).to(type);
    at::Tensor loss = at::empty({}, sums.options().dtype(type));
    return at::mul_out(loss, sum, scale);
  }
  const double *sum = sums.data_ptr<double>(), *scale = scales.data_ptr<double>();
  const double loss = sum[likelihood_loss_sum] * scale[scale_of_likelihood] + sum[z_loss_sum] * scale[scale_of_z];
  return scalar_of_host(loss, sums.options(), type);
}

/// The loss that is made of the rows.
inline LossAndSums loss_of_rows(const CrossEntropyOfRows& of, const at::Tensor& logits,
                                const CrossEntropySettings& settings, const CrossEntropyPositions& positions,
                                ReductionKind reduction) {
  if (reduction == ReductionKind::none) {
    return {losses_of_rows(of.rows, settings, positions).reshape(shape_of_positions(logits)), of.sums};
  }
  if (of.loss.defined()) return {of.loss, of.sums};
  return {reduced_loss(of.sums, positions.scales, settings.z_loss > 0, arithmetic_type(logits.scalar_type())), of.sums};
}

/// The loss, and the gradient of a reduced one if `gradient` is defined.
inline LossAndSums cross_entropy_forward(const at::Tensor& logits, const CrossEntropySettings& settings,
                                         const CrossEntropyPositions& positions, ReductionKind reduction,
                                         bool count_hits, const at::Tensor& gradient) {
  const WantedOfRows wanted{/*sums=*/true, reduction == ReductionKind::none, /*prediction=*/count_hits};
  return loss_of_rows(cross_entropy_rows(logits, settings, positions, gradient, /*upstream=*/{}, wanted), logits,
                      settings, positions, reduction);
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
